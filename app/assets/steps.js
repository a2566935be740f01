// One step of the decoder in numbers: scores, softmax, context gate, the likeliest next words.
let at = 0;

function grid(values, digits, label) {
  const flat = values.flat();
  const low = Math.min(...flat);
  const span = Math.max(...flat) - low || 1;
  const table = make("table", { "aria-label": label });
  for (const row of values) {
    const line = make("tr");
    for (const value of row) {
      const share = (value - low) / span;
      const cell = make("td", {}, value.toFixed(digits));
      // Weak enough that the number is legible on it, in light and in dark mode.
      cell.style.background = `rgba(249, 115, 22, ${(0.35 * share).toFixed(3)})`;
      line.append(cell);
    }
    table.append(line);
  }
  return table;
}

function bar(name, share, text) {
  const fill = make("div", { class: "fill" });
  fill.style.width = `${100 * share}%`;
  return make("div", { class: "row" }, make("span", {}, name), make("div", { class: "track" }, fill), make("span", { class: "number" }, text));
}

function mapName(step, number) {
  if (number > 0) return `head ${number}`;
  return step.entropies.length > 1 ? "mean of heads" : "entropy";
}

function render() {
  const root = element.querySelector(".steps");
  if (!root) return;
  const steps = props.value && props.value.steps;
  if (!steps) {
    root.replaceChildren(make("p", { class: "hint" }, "Choose a photo on the first tab. Its numbers appear here."));
    return;
  }
  at = Math.min(at, steps.length - 1);
  const shown = make("div");
  const slider = make("input", {
    type: "range", min: 0, max: steps.length - 1, step: 1, value: at, "aria-label": "Word of the caption",
    oninput: () => { at = Number(slider.value); show(); },
  });
  function show() {
    const step = steps[at];
    slider.setAttribute("aria-valuetext", step.word);
    const sentence = make("p", { class: "now" });
    steps.forEach((each, number) => sentence.append(number === at ? make("mark", {}, each.word) : each.word, " "));
    const left = make("div");
    let number = 1;
    if (step.scores) {
      left.append(make("h3", {}, `${number++}. Scores`), make("p", {}, "How well each region matches the decoder's state h."), grid(step.scores, 1, "Scores"));
    }
    left.append(
      make("h3", {}, `${number++}. Weights alpha, in percent`),
      make("p", {}, "The softmax of the scores. They sum to 100 %."),
      grid(step.weights.map((row) => row.map((value) => 100 * value)), 1, "Attention weights in percent"),
      make("h3", {}, "Entropy of the weights"),
      make("p", {}, `As a share of its maximum, log ${step.weights.flat().length}: 100 % for an even map, 0 % if one region has all the weight.`),
      make("div", { class: "entropy" }, ...step.entropies.map((share, place) => bar(mapName(step, place), share, `${(100 * share).toFixed(1)} %`))),
    );
    const right = make("div");
    if (step.beta !== null) {
      right.append(make("h3", {}, `${number++}. Context gate beta`), make("p", {}, "How much the context vector counts for this word."), bar("beta", step.beta, step.beta.toFixed(2)));
    }
    right.append(make("h3", {}, `${number}. Next word`), make("p", {}, "The likeliest words and their probabilities."));
    for (const { word, probability } of step.candidates) right.append(bar(word, probability, `${(100 * probability).toFixed(1)} %`));
    shown.replaceChildren(sentence, make("div", { class: "columns" }, left, right));
  }
  show();
  root.replaceChildren(slider, shown);
}

watch("value", () => { at = 0; render(); });
render();
