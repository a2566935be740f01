// The photograph, the words of its caption, and the map of the word that is pointed at. Everything a hover needs is
// here already: no word asks the server.
const view = { strength: 0.65, colours: "inferno", head: 0 };

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const percent = (share) => `${Math.round(100 * share)} %`;

// As captioner.heatmap.overlay: dim what was not looked at, cover what was with the map's colours.
function layers(map, size, strength, table) {
  const heat = Uint8Array.from(atob(map), (letter) => letter.charCodeAt(0));
  return [
    (value) => [0, 0, 0, 255 * 0.55 * strength * (1 - value / 255)],
    (value) => [...table[value], strength * value],
  ].map((colour) => {
    const layer = make("canvas", { width: size, height: size });
    const pixels = new ImageData(size, size);
    heat.forEach((value, place) => pixels.data.set(colour(value), 4 * place));
    layer.getContext("2d").putImageData(pixels, 0, 0);
    return layer;
  });
}

function draw(canvas, photo, map) {
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(photo, 0, 0, canvas.width, canvas.height);
  if (!map) return;
  for (const layer of layers(map, props.map_size, view.strength, props.tables[view.colours])) {
    context.drawImage(layer, 0, 0, canvas.width, canvas.height);
  }
}

function result(one, alone) {
  const photo = new Image();
  let chosen = 0;
  let pinned = -1; // the word that was clicked; a hover shows another only while it lasts
  let timer = 0;
  const canvas = make("canvas", { width: one.width, height: one.height, role: "img" });
  const words = make("p", { class: "words" });
  const strip = make("div", { class: "strip" });
  const others = make("ul", { class: "others" });
  const caption = () => one.captions[chosen];
  const mapOf = (word) => word.maps[Math.min(view.head, word.maps.length - 1)];

  function show(number) {
    const word = caption().words[number];
    draw(canvas, photo, word && mapOf(word));
    canvas.setAttribute("aria-label", caption().text + (word ? ` Lit: where the network looked for “${word.word}”.` : ""));
    canvas.dataset.word = word ? word.word : "";
    [...words.children].forEach((button, place) => button.setAttribute("aria-pressed", String(place === number)));
  }
  function pin(number) {
    pinned = pinned === number ? -1 : number;
    show(pinned);
  }
  function choose(number) {
    stop();
    chosen = number;
    pinned = -1;
    words.replaceChildren(
      ...caption().words.map((word, place) =>
        make(
          "button",
          {
            type: "button",
            class: "word",
            style: `--sure: ${word.confidence}`,
            title: `${percent(word.confidence)} sure of this word`,
            onmouseenter: () => show(place),
            onmouseleave: () => show(pinned),
            onfocus: () => show(place),
            onblur: () => show(pinned),
            onclick: () => pin(place),
          },
          word.word,
        ),
      ),
    );
    strip.replaceChildren(
      ...caption().words.map((word, place) => {
        const small = make("canvas", { width: 160, height: Math.round((160 * one.height) / one.width), role: "img" });
        small.setAttribute("aria-label", `Where the network looked for “${word.word}” in: ${caption().text}`);
        draw(small, photo, mapOf(word));
        return make(
          "figure",
          { onmouseenter: () => show(place), onmouseleave: () => show(pinned), onclick: () => pin(place) },
          small,
          make("figcaption", {}, word.word),
        );
      }),
    );
    [...others.querySelectorAll("button")].forEach((button, place) =>
      button.setAttribute("aria-pressed", String(place === number)),
    );
    show(-1);
  }
  function stop() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
  }
  const play = make("button", {
    type: "button",
    class: "play",
    onclick: () => {
      if (timer) {
        stop();
        show(pinned);
        return;
      }
      let next = 0;
      play.textContent = "Stop";
      const tick = () => {
        if (next < caption().words.length) show(next++);
        else {
          stop();
          show(pinned);
        }
      };
      tick();
      timer = setInterval(tick, 700);
    },
  }, "Play");
  const copy = make("button", {
    type: "button",
    class: "copy",
    onclick: async () => {
      try {
        await navigator.clipboard.writeText(caption().text);
        copy.textContent = "Copied";
      } catch {
        copy.textContent = "Cannot copy here";
      }
      setTimeout(() => (copy.textContent = "Copy caption"), 1500);
    },
  }, "Copy caption");
  const download = make("button", {
    type: "button",
    class: "download",
    onclick: () => make("a", { href: canvas.toDataURL("image/png"), download: "captioner.png" }).click(),
  }, "Download picture");

  one.captions.forEach((each, number) =>
    others.append(
      make("li", {}, make("button", { type: "button", onclick: () => choose(number) },
        make("span", {}, each.text), make("span", { class: "number" }, `${percent(each.confidence)} sure`))),
    ),
  );
  const node = make("section", { class: "result", "aria-label": one.model });
  if (!alone) node.append(make("p", { class: "model" }, one.model));
  node.append(words, make("div", { class: "stage" }, canvas), make("div", { class: "bar" }, play, copy, download));
  node.append(make("h3", {}, "Where it looked, word by word"), strip);
  if (one.captions.length > 1) node.append(make("h3", {}, "The captions it thought of"), others);
  photo.onload = () => choose(0);
  photo.src = one.photo;
  return { node, redraw: () => photo.complete && choose(chosen) };
}

function render() {
  const root = element.querySelector(".viewer");
  if (!root) return;
  const value = props.value;
  if (!value || !value.results) {
    const text = (value && value.error) || "Choose a photo: its caption appears here, and every word shows where it looked.";
    root.replaceChildren(make("p", value && value.error ? { class: "hint", role: "alert" } : { class: "hint" }, text));
    return;
  }
  const shown = value.results.map((one) => result(one, value.results.length === 1));
  const redraw = () => shown.forEach((each) => each.redraw());
  const colours = make("select", { class: "colours", onchange: () => { view.colours = colours.value; redraw(); } });
  Object.keys(props.tables).forEach((name) => colours.append(make("option", { value: name }, name)));
  colours.value = view.colours;
  const strength = make("input", {
    class: "strength", type: "range", min: 0.1, max: 1, step: 0.05, value: view.strength,
    oninput: () => { view.strength = Number(strength.value); redraw(); },
  });
  const bar = make("div", { class: "bar display" }, make("label", {}, "Colours", colours), make("label", {}, "Strength", strength));
  const heads = Math.max(...value.results.map((one) => one.heads));
  if (heads > 1) {
    const head = make("select", { class: "head", onchange: () => { view.head = Number(head.value); redraw(); } });
    head.append(make("option", { value: 0 }, "mean of all heads"));
    for (let number = 1; number <= heads; number++) head.append(make("option", { value: number }, `head ${number}`));
    head.value = view.head = Math.min(view.head, heads);
    bar.append(make("label", {}, "Head", head));
  }
  root.replaceChildren(make("div", { class: "results" }, ...shown.map((each) => each.node)), bar);
}

watch("value", render);
render();
