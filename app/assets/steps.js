// One step of the decoder in numbers, of one model or of two side by side: scores, softmax, context gate, self-attention
// over the words, the likeliest next words; and attention to change.
let at = 0;
let built = null; // what is on the page: its words, and a function that shows other numbers of them
let wanted; // the second model that was chosen here, null for none; undefined before anything was chosen

const TEMPERATURES = [0, 0.125, 0.25, 0.5, null, 2, 4, 8, "even"]; // in the middle attention as it is, which is 1

const named = (temperature) => ({ 0: "0, one region", even: "infinite, an even map" })[temperature] || String(temperature ?? 1);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
// The caption of the other model may be longer: this one stays at its end.
const stepOf = (steps) => Math.min(at, steps.length - 1);
// Weak enough that the text is legible on it, in light and in dark mode.
const shade = (share) => `rgba(249, 115, 22, ${(0.35 * share).toFixed(3)})`;

function grid(values, digits, label) {
  const flat = values.flat();
  const low = Math.min(...flat);
  const span = Math.max(...flat) - low || 1;
  const table = make("table", { "aria-label": label });
  for (const row of values) {
    const line = make("tr");
    for (const value of row) {
      const cell = make("td", {}, value.toFixed(digits));
      cell.style.background = shade((value - low) / span);
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

// `layers`: of a transformer, whose heads are those of the first layer, then those of the next; null for an LSTM.
function mapName(step, number, layers) {
  const heads = (step.entropies.length - 1) / (layers || 1);
  if (!heads) return "entropy";
  if (number === 0) return "mean of heads";
  const head = `head ${((number - 1) % heads) + 1}`;
  return layers > 1 ? `layer ${Math.ceil(number / heads)}, ${head}` : head;
}

// The words that were read so far, shaded by the weights of a layer's self-attention, (heads, words).
function wordsRead(words, layer, number) {
  const means = words.map((_, place) => layer.reduce((sum, weights) => sum + weights[place], 0) / layer.length);
  const most = Math.max(...means);
  const chips = words.map((word, place) => {
    const heads = layer.map((weights, head) => `head ${head + 1}: ${percent(weights[place])}`).join(", ");
    const chip = make("span", { class: "read", title: heads }, word, " ", make("span", { class: "number" }, percent(means[place])));
    chip.style.background = shade(means[place] / most);
    return chip;
  });
  return make("div", { class: "layer", role: "group", "aria-label": `Words read, layer ${number}` }, make("span", {}, `layer ${number}`), ...chips);
}

// The equations of the step with its numbers. Regions count from 1, row by row.
function equations(lines, step) {
  const columns = step.weights[0].length;
  const weights = step.weights.flat();
  const top = weights.indexOf(Math.max(...weights));
  const place = step.entropies.length === 1
    ? `Region ${top + 1} is in row ${Math.floor(top / columns) + 1}, column ${(top % columns) + 1}.`
    : `Regions are counted row by row, ${columns} in each row.`;
  return [
    make("h3", {}, "The equations with these numbers"),
    ...lines.map((line) => make("p", { class: "equation" }, line)),
    make("p", {}, place),
  ];
}

// What changes attention, at every step alone: the state that the words before it left behind stays as it is; and the
// choice of a second model.
function controls(first, ask) {
  const label = make("span", { class: "number" });
  const slider = make("input", {
    type: "range", min: 0, max: TEMPERATURES.length - 1, step: 1, "aria-label": "Temperature of attention's softmax",
    oninput: () => ask({ temperature: TEMPERATURES[slider.value] }),
  });
  const everywhere = make("button", { type: "button", onclick: () => ask({ temperature: now.temperature === "even" ? null : "even" }) }, "Look everywhere");
  const nowhere = make("button", { type: "button", onclick: () => ask({ context: !now.context }) }, "Look nowhere");
  const heat = make("label", {}, "Temperature of the softmax", slider, label);
  const others = props.models.filter((name) => name !== first);
  const second = make(
    "select", { onchange: () => ask({ second: (wanted = second.value || null) }) },
    make("option", { value: "" }, "none"), ...others.map((name) => make("option", { value: name }, name)),
  );
  const node = make("div", { class: "change" }, heat, everywhere, nowhere);
  if (others.length) node.append(make("label", { class: "second" }, "Second model", second));
  let now = null;
  function show(question) {
    now = question;
    slider.value = TEMPERATURES.indexOf(question.temperature);
    label.textContent = named(question.temperature);
    slider.setAttribute("aria-valuetext", label.textContent);
    everywhere.setAttribute("aria-pressed", String(question.temperature === "even"));
    nowhere.setAttribute("aria-pressed", String(!question.context));
    second.value = question.second || "";
  }
  // What none of the models can do is not offered.
  function offer(boards) {
    heat.hidden = !boards.some(({ steps }) => steps && steps.length && steps[0].scores);
    nowhere.hidden = !boards.some(({ gate }) => gate);
  }
  return { node, show, offer };
}

// The numbers of one model at the step; `title`: whether its name stands above them.
function board({ model, steps, error, problem, ...rest }, title) {
  const node = make("section", { class: "board", "aria-label": model });
  if (title) node.append(make("h2", {}, model));
  if (error) node.append(make("p", { class: "problem", role: "alert" }, error));
  if (problem) node.append(make("p", { class: "problem" }, problem)); // not announced again at every step
  if (error || !steps.length) return node;
  const place = stepOf(steps);
  const step = steps[place];
  const sentence = make("p", { class: "now" });
  steps.forEach((each, number) => sentence.append(number === place ? make("mark", {}, each.word) : each.word, " "));
  const left = make("div");
  let number = 1;
  if (step.scores) {
    left.append(make("h3", {}, `${number++}. Scores`), make("p", {}, "How well each region matches the decoder's state h."), grid(step.scores, 1, "Scores"));
  }
  left.append(
    make("h3", {}, `${number++}. Weights alpha, in percent`),
    make("p", {}, `The softmax of the scores${step.entropies.length > 1 ? ", the mean of the heads" : ""}. They sum to 100 %.`),
    grid(step.weights.map((row) => row.map((value) => 100 * value)), 1, "Attention weights in percent"),
    make("h3", {}, "Entropy of the weights"),
    make("p", {}, `As a share of its maximum, log ${step.weights.flat().length}: 100 % for an even map, 0 % if one region has all the weight.`),
    make("div", { class: "entropy" }, ...step.entropies.map((share, head) => bar(mapName(step, head, rest.layers), share, percent(share)))),
  );
  const right = make("div");
  if (step.beta !== null) {
    right.append(make("h3", {}, `${number++}. Context gate beta`), make("p", {}, "How much the context vector counts for this word."), bar("beta", step.beta, step.beta.toFixed(2)));
  }
  if (rest.layers) {
    const read = ["<start>", ...steps.slice(0, place).map((each) => each.word)];
    right.append(make("h3", {}, `${number++}. Self-attention over the words so far`));
    if (step.word_weights) {
      right.append(
        make("p", {}, "How much each layer takes from every word s, before it looks at the photo. The mean of its heads; point at a word for each head."),
        make("p", { class: "equation" }, "αₛ = exp(eₛ) / Σₛ exp(eₛ), eₛ = (Q x) · (K xₛ) / √d"),
        ...step.word_weights.map((layer, before) => wordsRead(read, layer, before + 1)),
      );
    } else right.append(make("p", {}, "The graphs in this model's file do not give its weights. Write new ones with captioner-export."));
  }
  right.append(make("h3", {}, `${number}. Next word`), make("p", {}, "The likeliest words and their probabilities."));
  for (const { word, probability } of step.candidates) right.append(bar(word, probability, percent(probability)));
  if (rest.before) {
    const { word, probability } = rest.before[place];
    right.append(make("p", { class: "before" }, `With attention as it is: ${word}, ${percent(probability)}.`));
  }
  right.append(...equations(rest.equations[place], step));
  node.append(sentence, make("div", { class: "columns" }, left, right));
  return node;
}

function render() {
  const root = element.querySelector(".steps");
  if (!root) return;
  const { boards, question, error } = props.value || {};
  if (error && built) {
    built.update(); // the controls too
    root.prepend(make("p", { class: "problem", role: "alert" }, error));
    return;
  }
  if (!boards || !boards[0].steps.length) {
    built = null;
    root.replaceChildren(make("p", { class: "hint" }, "Choose a photo on the first tab. Its numbers appear here."));
    return;
  }
  const words = JSON.stringify([boards[0].model, boards[0].steps.map((step) => step.word)]);
  if (!built || built.words !== words) {
    at = 0;
    built = { words, ...build(root, boards[0].model) };
  }
  built.update(props.value);
  // For a new photo the first tab asked, which knows the models that are chosen there.
  if (wanted !== undefined && wanted !== question.second && wanted !== boards[0].model) built.ask({ second: wanted });
}

function build(root, first) {
  let value = null;
  const shown = make("div", { class: "boards" });
  const slider = make("input", {
    type: "range", min: 0, step: 1, "aria-label": "Word of the caption", oninput: () => { at = Number(slider.value); show(); },
  });
  const change = controls(first, ask);
  function ask(part) {
    const question = { ...JSON.parse(root.dataset.question || "{}"), ...part };
    root.dataset.question = JSON.stringify(question); // where the request finds it
    change.show(question);
    if (part.second) shown.append(make("p", { class: "hint", role: "status" }, `${part.second} is captioning the photo.`));
    trigger("select");
  }
  function update(next = value) {
    value = next;
    root.querySelectorAll(":scope > .problem").forEach((each) => each.remove());
    root.dataset.question = JSON.stringify(value.question);
    slider.max = Math.max(...value.boards.map(({ steps }) => (steps ? steps.length - 1 : 0)));
    slider.value = at = Math.min(at, slider.max);
    change.show(value.question);
    change.offer(value.boards);
    show();
  }
  function show() {
    const words = value.boards.filter(({ steps }) => steps && steps.length).map(({ steps }) => steps[stepOf(steps)].word);
    slider.setAttribute("aria-valuetext", words.join(" / "));
    shown.replaceChildren(...value.boards.map((each) => board(each, value.boards.length > 1)));
  }
  root.replaceChildren(make("label", {}, "Word", slider), change.node, shown);
  return { update, ask };
}

watch("value", render);
render();
