// Regions of a photo that people hide from the network. A hidden region is a box [left, top, width, height], in shares of
// the photo's width and height, so that models with other grids can be asked about it too.
const within = ([left, top, width, height], x, y) => x >= left && x < left + width && y >= top && y < top + height;

// Where the cells of `count` regions begin and end along one side: where heatmaps show them, the last as far as the edge.
function edgesOf(count, displacement) {
  const edges = Array.from({ length: count + 1 }, (_, place) => Math.min(1, Math.max(0, place / count - displacement)));
  edges[count] = 1;
  return edges;
}

// The boxes of all regions, row by row.
function cellsOf({ grid: [rows, columns], displacement: [down, right] }) {
  const [ys, xs] = [edgesOf(rows, down), edgesOf(columns, right)];
  return Array.from({ length: rows * columns }, (_, region) => {
    const [row, column] = [Math.floor(region / columns), region % columns];
    return [xs[column], ys[row], xs[column + 1] - xs[column], ys[row + 1] - ys[row]];
  });
}

const STEP = 4; // pixels between the places of a dragged pointer's way that are looked at

const middle = ([left, top, width, height]) => [left + width / 2, top + height / 2];

// The numbers of the regions whose middle lies in one of the boxes.
const regionsIn = (boxes, cells) =>
  cells.flatMap((cell, region) => (boxes.some((box) => within(box, ...middle(cell))) ? [region] : []));

// A button for each region, to be laid over the photo: a click, a tap or the space key hides its region or shows it
// again, and so does a pointer that is dragged over it. They are one stop of the tab key; arrow keys move among them.
//   one: a result, with its grid and displacement.
//   boxes: those that are hidden.
//   change: called with the new ones.
function regionBoard(one, boxes, change) {
  const [rows, columns] = one.grid;
  const cells = cellsOf(one);
  const hidden = cells.map(() => false);
  regionsIn(boxes, cells).forEach((region) => (hidden[region] = true));
  let drawing = true; // whether the pointer that is down hides or shows
  let drawn = false; // whether the click of this pointer is done already
  let last = [0, 0]; // where it was seen last, in the window

  function set(region, value) {
    if (value && hidden.filter((each) => !each).length === 1) return; // the network has to look somewhere
    if (!cells[region][2] || !cells[region][3]) return; // where the displacement leaves it no room
    boxes = boxes.filter((box) => !within(box, ...middle(cells[region])));
    if (value) boxes.push(cells[region]);
    hidden[region] = value;
    buttons[region].setAttribute("aria-pressed", String(value));
  }
  // A fast pointer is seen in few places: what lies on the line from one to the next is drawn too.
  function draw({ clientX, clientY }) {
    const [x, y] = last;
    const steps = Math.max(1, Math.ceil(Math.hypot(clientX - x, clientY - y) / STEP));
    for (let step = 1; step <= steps; step++) {
      const [across, down] = [x + ((clientX - x) * step) / steps, y + ((clientY - y) * step) / steps];
      const region = buttons.indexOf(document.elementFromPoint(across, down));
      if (region >= 0 && hidden[region] !== drawing) set(region, drawing);
    }
    last = [clientX, clientY];
  }
  function end() {
    document.removeEventListener("pointermove", draw);
    for (const name of ["pointerup", "pointercancel"]) document.removeEventListener(name, end);
    board.classList.remove("drawing");
    change(boxes);
  }
  function move(event, region) {
    const [row, column] = [Math.floor(region / columns), region % columns];
    const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] || [];
    if (down === undefined) return;
    event.preventDefault();
    const inside = (place, count) => Math.min(count - 1, Math.max(0, place));
    buttons[inside(row + down, rows) * columns + inside(column + right, columns)].focus();
  }
  const buttons = cells.map((_, region) =>
    make("button", {
      type: "button",
      tabindex: region ? -1 : 0,
      "aria-pressed": String(hidden[region]),
      "aria-label": `Row ${Math.floor(region / columns) + 1}, column ${(region % columns) + 1}`,
      onclick: ({ detail }) => {
        if (drawn && detail) return; // a key's click has no detail
        set(region, !hidden[region]);
        change(boxes);
      },
      onkeydown: (event) => move(event, region),
    }),
  );
  const share = (edges) => edges.slice(1).map((edge, place) => `minmax(0, ${1000 * (edge - edges[place])}fr)`).join(" ");
  const board = make("div", {
    class: "regions",
    role: "group",
    "aria-live": "off",
    "aria-label": "Regions of the photo. Arrow keys move, space hides.",
    style: `grid-template-rows: ${share(edgesOf(rows, one.displacement[0]))}; grid-template-columns: ${share(edgesOf(columns, one.displacement[1]))}`,
    onpointerdown: (event) => {
      const region = buttons.indexOf(event.target);
      drawn = event.pointerType !== "touch" && event.button === 0 && region >= 0; // a finger scrolls, and taps
      if (!drawn) return;
      drawing = !hidden[region];
      last = [event.clientX, event.clientY];
      board.classList.add("drawing");
      draw(event);
      document.addEventListener("pointermove", draw);
      for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, end);
    },
    onfocusin: ({ target }) => buttons.forEach((button) => (button.tabIndex = button === target ? 0 : -1)),
  }, ...buttons);
  return board;
}

