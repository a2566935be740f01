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
  let drawing = null; // whether the pointer that is down hides or shows; null where none is
  let drawn = false; // whether the click of this pointer is done already

  function set(region, value) {
    if (value && hidden.filter((each) => !each).length === 1) return; // the network has to look somewhere
    if (!cells[region][2] || !cells[region][3]) return; // where the displacement leaves it no room
    boxes = boxes.filter((box) => !within(box, ...middle(cells[region])));
    if (value) boxes.push(cells[region]);
    hidden[region] = value;
    buttons[region].setAttribute("aria-pressed", String(value));
  }
  function draw(event) {
    const region = buttons.indexOf(document.elementFromPoint(event.clientX, event.clientY));
    if (region >= 0 && hidden[region] !== drawing) set(region, drawing);
  }
  function end() {
    if (drawing === null) return;
    drawing = null;
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
      board.classList.add("drawing");
      draw(event);
      for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, end, { once: true });
    },
    onfocusin: ({ target }) => buttons.forEach((button) => (button.tabIndex = button === target ? 0 : -1)),
    onpointermove: (event) => { if (drawing !== null) draw(event); },
  }, ...buttons);
  return board;
}

