// One step of the decoder in numbers: scores, softmax, context gate, the likeliest next words; and attention to change.
let at = 0;
let plain = null; // the steps with attention as it is

const TEMPERATURES = [0, 0.125, 0.25, 0.5, null, 2, 4, 8, "even"]; // in the middle attention as it is, which is 1
const SCORES = {
  additive: "v · tanh(W aᵢ + U h)",
  hard: "v · tanh(W aᵢ + U h)",
  dot: "(U h) · (W aᵢ)",
  scaled_dot: "(U h) · (W aᵢ) / √d",
};

const below = (number) => [...String(number)].map((digit) => "₀₁₂₃₄₅₆₇₈₉"[digit]).join("");
const named = (temperature) => ({ 0: "0, one region", even: "infinite, an even map" })[temperature] || String(temperature ?? 1);
const changed = ({ temperature, context }) => temperature !== null || !context;

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

// The equations of the step with its numbers, for the region of the largest weight. Regions count from 1, row by row.
function equations(step, mechanism, { temperature, context }) {
  const weights = step.weights.flat();
  const order = [...weights.keys()].sort((one, other) => weights[other] - weights[one]);
  const top = order[0];
  const i = below(top + 1);
  const columns = step.weights[0].length;
  const lines = [];
  if (step.scores) {
    const scores = step.scores.flat();
    if (SCORES[mechanism]) lines.push(`eᵢ = ${SCORES[mechanism]}, e${i} = ${scores[top].toFixed(2)}`);
    if (mechanism === "hard" && temperature === null) lines.push("αᵢ = 1 for the region with the largest score, else 0");
    else if (temperature === null || temperature > 0) {
      const heat = temperature ?? 1;
      const sum = scores.reduce((total, score) => total + Math.exp((score - scores[top]) / heat), 0);
      const divided = heat === 1 ? "" : ` / ${heat}`;
      lines.push(`α${i} = exp(e${i}${divided}) / Σᵢ exp(eᵢ${divided}) = ${(1 / sum).toFixed(3)}`);
    }
  }
  if (temperature === 0) lines.push(`α${i} = 1, the others are 0`);
  if (temperature === "even" || mechanism === "none") lines.push(`αᵢ = 1 / ${weights.length} = ${(1 / weights.length).toFixed(3)}`);
  if (step.beta !== null) lines.push(context ? `β = σ(w · h) = ${step.beta.toFixed(2)}` : "β = 0");
  if (step.entropies.length === 1) {
    const seen = order.filter((region) => weights[region] >= 0.0005);
    const terms = seen.slice(0, 3).map((region) => `${weights[region].toFixed(3)} a${below(region + 1)}`);
    const sum = terms.join(" + ") + (seen.length > 3 ? " + …" : "");
    const gate = step.beta === null ? "" : "β ";
    lines.push(`z = ${gate}Σᵢ αᵢ aᵢ = ${gate && `${step.beta.toFixed(2)} · `}(${sum})`);
  }
  if (!lines.length) return [];
  return [
    make("h3", {}, "The equations with these numbers"),
    ...lines.map((line) => make("p", { class: "equation" }, line)),
    make("p", {}, `Region ${top + 1} is in row ${Math.floor(top / columns) + 1}, column ${(top % columns) + 1}.`),
  ];
}

// What changes attention, at every step alone: the state that the words before it left behind stays as it is.
function controls(value, ask) {
  const label = make("span", { class: "number" });
  const slider = make("input", {
    type: "range", min: 0, max: TEMPERATURES.length - 1, step: 1, "aria-label": "Temperature of attention's softmax",
    oninput: () => ask({ temperature: TEMPERATURES[slider.value] }),
  });
  const everywhere = make("button", { type: "button", onclick: () => ask({ temperature: now.temperature === "even" ? null : "even" }) }, "Look everywhere");
  const nowhere = make("button", { type: "button", onclick: () => ask({ context: !now.context }) }, "Look nowhere");
  let now = value.question;
  const node = make("div", { class: "change" });
  if (value.steps[0].scores) node.append(make("label", {}, "Temperature of the softmax", slider, label));
  node.append(everywhere);
  if (value.gate) node.append(nowhere);
  function show(question) {
    now = question;
    slider.value = TEMPERATURES.indexOf(question.temperature);
    label.textContent = named(question.temperature);
    slider.setAttribute("aria-valuetext", label.textContent);
    everywhere.setAttribute("aria-pressed", String(question.temperature === "even"));
    nowhere.setAttribute("aria-pressed", String(!question.context));
  }
  return { node, show };
}

let update = null; // shows other numbers of the same words

function render() {
  const root = element.querySelector(".steps");
  if (!root) return;
  const { steps, error } = props.value || {};
  root.querySelectorAll(".problem").forEach((each) => each.remove());
  if (error && plain) {
    root.prepend(make("p", { class: "problem", role: "alert" }, error));
    return;
  }
  if (!steps || !steps.length) {
    update = plain = null;
    root.replaceChildren(make("p", { class: "hint" }, "Choose a photo on the first tab. Its numbers appear here."));
    return;
  }
  const same = plain && JSON.stringify(plain.map((step) => step.word)) === JSON.stringify(steps.map((step) => step.word));
  if (!changed(props.value.question)) plain = steps;
  if (same) update(props.value);
  else {
    at = 0;
    build(root);
  }
}

function build(root) {
  let value = props.value;
  const shown = make("div");
  const slider = make("input", {
    type: "range", min: 0, max: value.steps.length - 1, step: 1, value: at, "aria-label": "Word of the caption",
    oninput: () => { at = Number(slider.value); show(); },
  });
  const change = controls(value, (part) => {
    const question = { ...JSON.parse(root.dataset.question || "{}"), ...part };
    root.dataset.question = JSON.stringify(question); // where the request finds it
    change.show(question);
    trigger("select");
  });
  update = (next) => {
    value = next;
    root.dataset.question = JSON.stringify(value.question);
    change.show(value.question);
    show();
  };
  function show() {
    const { steps, mechanism, question } = value;
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
    if (changed(question)) {
      const [first] = plain[at].candidates;
      right.append(make("p", { class: "before" }, `With attention as it is: ${first.word}, ${(100 * first.probability).toFixed(1)} %.`));
    }
    right.append(...equations(step, mechanism, question));
    shown.replaceChildren(sentence, make("div", { class: "columns" }, left, right));
  }
  root.replaceChildren(make("label", {}, "Word", slider), change.node, shown);
  update(value);
}

watch("value", render);
render();
