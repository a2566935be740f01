// The photo, the words of its caption, and the map of the word under the pointer. All maps are in the value already:
// pointing at a word asks nothing of the network. This is the body of a function of `element`, the component on the
// page, `props`, its properties, `watch(name, callback)`, which calls back when a property changes, and `trigger(name,
// data)`, an event. Gradio calls it on the demo's page.
const view = { strength: 0.65, colours: "inferno", head: 0, scale: "caption", of: "attention" };

// What the page is asked to show: in which photo, which boxes of it are hidden, and whether evidence is measured.
const question = { photo: null, hide: [], evidence: false };

function ask(change) {
  Object.assign(question, change);
  remember();
  const regions = regionsIn(question.hide, cellsOf(props.value.results[0]));
  trigger("select", { regions, evidence: question.evidence });
}

// On the demo's page this is where the request finds the question.
const remember = () => (element.querySelector(".viewer").dataset.question = JSON.stringify(question));

const percent = (share) => `${Math.round(100 * share)} %`;
const times = (multiple) => `${multiple.toFixed(1)}×`;
const looked = () => view.of === "attention";
// The largest value of a map, for people: a weight as a multiple of an even map's, or evidence in nats.
const amount = (peak) => (looked() ? times(peak) : peak.toFixed(2));

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

// `map.bytes`: a map whose largest byte is 255. `map.peak`: what 255 stands for, see `amount`. `top`: what the brightest
// colour stands for. Without either the photo is drawn as it is.
function draw(canvas, photo, map, top) {
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(photo, 0, 0, canvas.width, canvas.height);
  if (!map || !top) return;
  const bytes = Uint8Array.from(atob(map.bytes), (letter) => Math.round((letter.charCodeAt(0) * map.peak) / top));
  cover(canvas, bytes, props.map_size);
}

// The colours from 0 to the top of the scale, drawn over middle grey, for attention with a mark at the weight of an even
// map, and the choice of the scale, which all results share.
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
  function show(top, missing) {
    const context = ramp.getContext("2d");
    context.fillStyle = "#808080";
    context.fillRect(0, 0, 256, 1);
    cover(ramp, Uint8Array.from({ length: 256 }, (_, place) => place), 256);
    scale.value = view.scale;
    end.textContent = top ? amount(top) : "largest of the word";
    ramp.setAttribute("aria-label", `Colours of the ${looked() ? "weights" : "evidence"}, from 0 to ${end.textContent}`);
    mark.hidden = !top || !looked();
    mark.style.left = `${top ? 100 / top : 0}%`;
    if (looked()) note.textContent = `1×${top ? " (marked)" : ""}: the weight of an even map, 1/${regions}`;
    else note.textContent = missing || "Fall of the word's log-probability, in nats, when this part is hidden";
  }
  return { node, show };
}

function result(one, number, alone, redrawAll) {
  const photo = photoOf(one.photo);
  const captions = one.hidden || one.captions;
  const before = one.hidden && one.captions[0]; // stands above the caption without the hidden regions
  let chosen = 0;
  let pinned = null; // the word that was clicked; a hover shows another only while it lasts
  let timer = 0;
  const canvas = make("canvas", { width: one.width, height: one.height, role: "img" });
  const sentences = make("div", { class: "sentences" });
  const strip = make("div", { class: "strip" });
  const others = make("ul", { class: "others" });
  const caption = () => captions[chosen];
  const mapOf = (word) => (looked() ? word.maps[Math.min(view.head, word.maps.length - 1)] : word.evidence);
  const peakOf = (word) => (mapOf(word) ? mapOf(word).peak : 0);
  const scale = legend(one.regions, redrawAll);
  // The top of the scale: the largest value of all words, or of this one; null where nothing is lit.
  function topOf(word) {
    if (view.scale === "word") return (word && peakOf(word)) || null;
    return Math.max(0, ...[...(before ? before.words : []), ...caption().words].map(peakOf)) || null;
  }
  // Why no map can be shown.
  function missing() {
    if (looked() || !caption().words.length || caption().words[0].evidence) return "";
    return chosen ? "What it used is measured for the first caption only." : "Being measured.";
  }
  function told(word) {
    if (!mapOf(word)) return missing();
    if (looked()) return `largest weight ${times(peakOf(word))} that of an even map`;
    return `largest evidence ${amount(peakOf(word))} nats`;
  }

  function show(word) {
    draw(canvas, photo, word && mapOf(word), topOf(word));
    scale.show(topOf(word), missing());
    const lit = word && ` ${looked() ? "Attention" : "Evidence"} for “${word.word}”: ${told(word)}.`;
    canvas.setAttribute("aria-label", caption().text + (lit || ""));
    canvas.dataset.word = word ? word.word : "";
    buttons.forEach(([button, each]) => button.setAttribute("aria-pressed", String(each === word)));
  }
  function pin(word) {
    pinned = pinned === word ? null : word;
    show(pinned);
  }
  let buttons = []; // with the word of each
  // The words of a caption as buttons, each over its probabilities; those at the places `changed` are marked.
  function sentence(words, changed, name) {
    const line = make("p", { class: name });
    words.forEach((word, place) => {
      const button = make("button", {
        type: "button",
        class: "word",
        style: `--probability: ${word.probability}`,
        title: `Probability ${percent(word.probability)}; ${told(word)}`,
        onmouseenter: () => show(word),
        onmouseleave: () => show(pinned),
        onfocus: () => show(word),
        onblur: () => show(pinned),
        onclick: () => pin(word),
      }, word.word);
      buttons.push([button, word]);
      const without = typeof word.without === "number" ? ` → ${percent(word.without)}` : "";
      line.append(make("span", { class: changed.has(place) ? "said changed" : "said" },
        button, make("span", { class: "odds number" }, percent(word.probability) + without)), " ");
    });
    return line;
  }
  function choose(number) {
    stop();
    chosen = number;
    pinned = null;
    buttons = [];
    const { words } = caption();
    const [gone, come] = changedWords(...[before ? before.words : words, words].map((line) => line.map((each) => each.word)));
    sentences.replaceChildren();
    if (before) {
      const news = come.size + gone.size ? `${come.size} of ${words.length} words are new` : "The words stay the same";
      sentences.append(
        make("h3", {}, "All regions"), sentence(before.words, gone, "words before"),
        make("h3", {}, `Without ${one.hidden_regions} of ${one.regions} regions`), sentence(words, come, "words"),
        make("p", { class: "note" }, `${news}.`),
      );
    } else sentences.append(sentence(words, come, "words"));
    if (one.most && words.length) {
      const regions = one.most === 1 ? "the region" : `the ${one.most} regions`;
      sentences.append(make("p", { class: "note" }, `Under each word: its probability → without ${regions} it looked at most.`));
    }
    strip.replaceChildren(
      ...words.map((word) => {
        const small = make("canvas", { width: 160, height: Math.max(1, Math.round((160 * one.height) / one.width)), role: "img" });
        small.setAttribute("aria-label", `${looked() ? "Attention" : "Evidence"} for “${word.word}” in: ${caption().text}`);
        draw(small, photo, mapOf(word), topOf(word));
        return make(
          "figure",
          { onmouseenter: () => show(word), onmouseleave: () => show(pinned), onclick: () => pin(word) },
          small,
          make("figcaption", {}, word.word, " ", make("span", { class: "number" }, mapOf(word) ? amount(peakOf(word)) : "")),
        );
      }),
    );
    heading.textContent = `${looked() ? "Where it looked" : "What it used"}, word by word`;
    [...others.querySelectorAll("button")].forEach((button, place) =>
      button.setAttribute("aria-pressed", String(place === number)),
    );
    show(null);
  }
  const heading = make("h3", {});
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
        if (next < caption().words.length) show(caption().words[next++]);
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
    onclick: () => make("a", { href: picture(pinned).toDataURL("image/png"), download: "captioner.png" }).click(),
  }, "Download picture");

  // What the download holds: what is shown, or where evidence is known both maps of a word side by side.
  function picture(word) {
    if (!word || !word.evidence) return canvas;
    const both = make("canvas", { width: 2 * one.width + 8, height: one.height });
    const kept = view.of;
    ["attention", "evidence"].forEach((of, place) => {
      view.of = of;
      const half = make("canvas", { width: one.width, height: one.height });
      draw(half, photo, mapOf(word), topOf(word));
      both.getContext("2d").drawImage(half, place * (one.width + 8), 0);
    });
    view.of = kept;
    return both;
  }

  captions.forEach((each, number) =>
    others.append(
      make("li", {}, make("button", { type: "button", onclick: () => choose(number) },
        make("span", {}, each.text), make("span", { class: "number" }, `confidence ${percent(each.confidence)}`))),
    ),
  );
  const node = make("section", { class: "result", "aria-label": one.model });
  if (!alone) node.append(make("p", { class: "model" }, one.model));
  const stage = make("div", { class: "stage", style: `--shape: ${one.width / one.height}` }, canvas,
    regionBoard(one, question.hide, (hide) => ask({ hide })));
  [...stage.querySelectorAll("button")].forEach((button, region) => (button.dataset.key = `region-${number}-${region}`));
  node.append(sentences, stage, scale.node, make("div", { class: "bar" }, play, copy, download));
  node.append(heading, strip);
  if (captions.length > 1) node.append(make("h3", {}, "All captions found"), others);
  if (photo.complete) choose(0);
  else photo.addEventListener("load", () => choose(0));
  function redraw() {
    if (!photo.complete) return;
    const kept = pinned;
    choose(chosen);
    if (kept) pin(kept);
  }
  return { node, redraw };
}

const photos = new Map(); // the latest one: an answer about the same photo does not wait for it

function photoOf(address) {
  if (!photos.has(address)) {
    photos.clear();
    const photo = new Image();
    photo.src = address;
    photos.set(address, photo);
  }
  return photos.get(address);
}

const WHY = "Attention is set before the word is chosen, and the vector of a region also describes what lies around it. "
  + "What the word rests on is measured afterwards: how far its probability falls when a region and its neighbours are hidden.";

// Over the photos: which maps are shown, and what is hidden.
function tools(redraw) {
  const node = make("div", { class: "tools" });
  const kinds = [["attention", "Where it looked"], ["evidence", "What it used"]].map(([of, name]) =>
    make("button", {
      type: "button",
      "data-key": of,
      onclick: () => {
        view.of = of;
        show();
        redraw();
        if (of === "evidence" && !question.evidence) ask({ evidence: true });
      },
    }, name),
  );
  const show = () => kinds.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.key === view.of)));
  show();
  const why = make("details", {}, make("summary", {}, "Why they differ"), make("p", { class: "note" }, WHY));
  if (props.measures) node.append(make("div", { class: "bar switch", role: "group", "aria-label": "What the maps show" }, ...kinds, why));
  const all = make("button", { type: "button", "data-key": "all", onclick: () => question.hide.length && ask({ hide: [] }) }, "Show all regions");
  node.append(make("div", { class: "bar" }, make("span", {}, "Click or drag over the photo to hide regions of it."), all));
  return node;
}

let drawnFor = null; // the photo that is shown

function render() {
  const root = element.querySelector(".viewer");
  if (!root || root.querySelector(".drawing")) return; // the end of the drawing asks anew
  const value = props.value;
  if (value && value.error && value.asked && value.asked === question.photo && root.querySelector(".result")) {
    root.querySelectorAll(".problem").forEach((each) => each.remove());
    root.prepend(make("p", { class: "problem", role: "alert" }, value.error)); // what was found before is still right
    return;
  }
  if (!value || !value.results) {
    question.photo = null;
    const text = (value && value.error) || "Choose a photo. Its caption appears here; point at a word to see where the network attended.";
    root.replaceChildren(make("p", value && value.error ? { class: "hint", role: "alert" } : { class: "hint" }, text));
    return;
  }
  if (question.photo !== value.asked) Object.assign(question, { photo: value.asked, hide: [] });
  remember();
  const redraw = () => shown.forEach((each) => each.redraw());
  const shown = value.results.map((one, number) => result(one, number, value.results.length === 1, redraw));
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
  const { key } = root.contains(document.activeElement) ? document.activeElement.dataset : {};
  const topOf = () => root.querySelector(".stage")?.getBoundingClientRect().top;
  const before = topOf();
  root.replaceChildren(tools(redraw), make("div", { class: "results" }, ...shown.map((each) => each.node)), bar);
  if (key) root.querySelector(`[data-key="${key}"]`)?.focus({ preventScroll: true });
  // The photo stays under the pointer when a caption more or less stands above it.
  if (before !== undefined && value.asked === drawnFor) scrollBy(0, topOf() - before);
  drawnFor = value.asked;
}

watch("value", render);
render();
