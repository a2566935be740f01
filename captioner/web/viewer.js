// The photo, the words of its caption, and the map of the word under the pointer. All maps are in the value already:
// pointing at a word asks nothing of the network. This is the body of a function of `element`, the component on the
// page, `props`, its properties, and `watch(name, callback)`, which calls back when a property changes. Gradio calls it
// on the demo's page.
const view = { strength: 0.65, colours: "inferno", head: 0, scale: "caption" };

const percent = (share) => `${Math.round(100 * share)} %`;
const times = (multiple) => `${multiple.toFixed(1)}×`;

// As captioner.heatmap.overlay: regions of low weight are dimmed, those of high weight get the colours. `heat`: bytes.
function layers(heat, width) {
  const table = props.tables[view.colours];
  return [
    (value) => [0, 0, 0, 255 * 0.55 * view.strength * (1 - value / 255)],
    (value) => [...table[value], view.strength * Math.sqrt(255 * value)],
  ].map((colour) => {
    const layer = make("canvas", { width, height: heat.length / width });
    const pixels = new ImageData(width, heat.length / width);
    heat.forEach((value, place) => pixels.data.set(colour(value), 4 * place));
    layer.getContext("2d").putImageData(pixels, 0, 0);
    return layer;
  });
}

function cover(canvas, heat, width) {
  const context = canvas.getContext("2d");
  for (const layer of layers(heat, width)) context.drawImage(layer, 0, 0, canvas.width, canvas.height);
}

// `map.bytes`: a map whose largest byte is 255. `map.peak`: the weight that 255 stands for, as a multiple of an even
// map's weight. `top`: the multiple that the brightest colour stands for.
function draw(canvas, photo, map, top) {
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(photo, 0, 0, canvas.width, canvas.height);
  if (!map) return;
  const bytes = Uint8Array.from(atob(map.bytes), (letter) => Math.round((letter.charCodeAt(0) * map.peak) / top));
  cover(canvas, bytes, props.map_size);
}

// The colours from 0 to the top of the scale, drawn over middle grey, with a mark at the weight of an even map, and the
// choice of the scale, which all results share.
function legend(regions, redraw) {
  const ramp = make("canvas", { width: 256, height: 1, role: "img" });
  const mark = make("span", { class: "mark" });
  const end = make("span", { class: "number" });
  const note = make("span", {});
  const scale = make("select", { class: "scale", onchange: () => { view.scale = scale.value; redraw(); } },
    make("option", { value: "caption" }, "per caption"), make("option", { value: "word" }, "per word"));
  const node = make("div", { class: "legend", "aria-live": "off" },
    make("span", {}, "0"), make("span", { class: "ramp" }, ramp, mark), end,
    make("div", { class: "note" }, note, make("label", {}, "Scale", scale)));
  function show(top) {
    const context = ramp.getContext("2d");
    context.fillStyle = "#808080";
    context.fillRect(0, 0, 256, 1);
    cover(ramp, Uint8Array.from({ length: 256 }, (_, place) => place), 256);
    scale.value = view.scale;
    end.textContent = top ? times(top) : "largest of the word";
    ramp.setAttribute("aria-label", `Colours of the weights, from 0 to ${end.textContent}`);
    mark.hidden = !top;
    mark.style.left = `${top ? 100 / top : 0}%`;
    note.textContent = `1×${top ? " (marked)" : ""}: the weight of an even map, 1/${regions}`;
  }
  return { node, show };
}

function result(one, alone, redrawAll) {
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
  const scale = legend(one.regions, redrawAll);
  // The top of the scale: the largest weight of all words, or of this one; null where no word is shown.
  function topOf(word) {
    if (view.scale === "word") return word ? mapOf(word).peak : null;
    return Math.max(0, ...caption().words.map((each) => mapOf(each).peak)) || null;
  }

  function show(number) {
    const word = caption().words[number];
    draw(canvas, photo, word && mapOf(word), topOf(word));
    scale.show(topOf(word));
    const lit = word && ` Attention for “${word.word}”: at most ${times(mapOf(word).peak)} the weight of an even map.`;
    canvas.setAttribute("aria-label", caption().text + (lit || ""));
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
            style: `--probability: ${word.probability}`,
            title: `Probability ${percent(word.probability)}; largest weight ${times(mapOf(word).peak)} that of an even map`,
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
        const small = make("canvas", { width: 160, height: Math.max(1, Math.round((160 * one.height) / one.width)), role: "img" });
        small.setAttribute("aria-label", `Attention for “${word.word}” in: ${caption().text}`);
        draw(small, photo, mapOf(word), topOf(word));
        return make(
          "figure",
          { onmouseenter: () => show(place), onmouseleave: () => show(pinned), onclick: () => pin(place) },
          small,
          make("figcaption", {}, word.word, " ", make("span", { class: "number" }, times(mapOf(word).peak))),
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
        make("span", {}, each.text), make("span", { class: "number" }, `confidence ${percent(each.confidence)}`))),
    ),
  );
  const node = make("section", { class: "result", "aria-label": one.model });
  if (!alone) node.append(make("p", { class: "model" }, one.model));
  node.append(words, make("div", { class: "stage" }, canvas), scale.node, make("div", { class: "bar" }, play, copy, download));
  node.append(make("h3", {}, "Attention, word by word"), strip);
  if (one.captions.length > 1) node.append(make("h3", {}, "All captions found"), others);
  photo.onload = () => choose(0);
  photo.src = one.photo;
  function redraw() {
    if (!photo.complete) return;
    const kept = pinned;
    choose(chosen);
    if (kept >= 0) pin(kept);
  }
  return { node, redraw };
}

function render() {
  const root = element.querySelector(".viewer");
  if (!root) return;
  const value = props.value;
  if (!value || !value.results) {
    const text = (value && value.error) || "Choose a photo. Its caption appears here; point at a word to see where the network attended.";
    root.replaceChildren(make("p", value && value.error ? { class: "hint", role: "alert" } : { class: "hint" }, text));
    return;
  }
  const redraw = () => shown.forEach((each) => each.redraw());
  const shown = value.results.map((one) => result(one, value.results.length === 1, redraw));
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
