// What the words of a caption rest on, as captioner/hiding.py measures it.
import { Tensor } from "./onnxruntime/ort.js";
import { forImages } from "./engine.js";
import { stepsOf } from "./search.js";

const BATCH = 16; // variants that are read together

// How far the log-probability of each word falls when a region and its neighbours are hidden while it is chosen.
//   annotations: (1, regions, channels). mask: 1 where a region is visible. words: ids.
//   grid: rows and columns. window: how many of them are hidden together, an odd number.
//   wanted: asked before each batch of variants whether to go on; null is returned where it gives false.
// Returns for each word a value for each region, in nats: 0 where the word becomes likelier, and for hidden regions.
export async function measureEvidence(engine, annotations, mask, words, { grid, window, wanted }) {
  const visible = [...mask.keys()].filter((region) => mask[region]);
  const variants = visible.map((region) => ({ region, mask: withoutWindow(mask, region, grid[1], Math.floor(window / 2)) }));
  const whole = await stepsOf(engine, annotations, mask, words);
  const falls = whole.map(() => new Float32Array(mask.length));
  // The log-probabilities of each word, by the images of a memory.
  const read = async (memory) => {
    const count = memory.mask.dims[0];
    const found = [];
    for (const { state, token, logProbabilityOf } of whole) {
      const step = await engine.step(memory, forImages(state, count), new Array(count).fill(token));
      found.push(step.logits.map(logProbabilityOf));
    }
    return found;
  };
  const note = (place, { region }, without) => {
    falls[place][region] = Math.max(0, whole[place].logProbability - without);
  };
  const { memory } = await engine.encode(annotations, mask);
  const [some, none] = [true, false].map((left) => variants.filter((variant) => variant.mask.some(Boolean) === left));
  for (let first = 0; first < some.length; first += BATCH) {
    if (!(await wanted())) return null;
    const batch = some.slice(first, first + BATCH);
    const found = await read(memoryOf(memory, batch.map((variant) => variant.mask)));
    found.forEach((values, place) => values.forEach((value, image) => note(place, batch[image], value)));
  }
  if (none.length) {
    if (!(await wanted())) return null;
    const blank = await engine.encode(zerosLike(annotations), new Uint8Array(mask.length).fill(1));
    const found = await read(blank.memory);
    found.forEach(([value], place) => none.forEach((variant) => note(place, variant, value)));
  }
  return falls;
}

// The mask with what is at most `reach` rows and columns away from a region hidden too.
function withoutWindow(mask, region, columns, reach) {
  const [row, column] = [Math.floor(region / columns), region % columns];
  return mask.map((visible, other) => {
    const away = Math.max(Math.abs(Math.floor(other / columns) - row), Math.abs((other % columns) - column));
    return away > reach ? visible : 0;
  });
}

// Vectors of zero, which stand for no picture where a window leaves attention nothing.
function zerosLike(annotations) {
  return new Tensor("float32", new Float32Array(annotations.data.length), annotations.dims);
}

// The memory of one image once for each mask: the vectors and their keys do not depend on it.
function memoryOf({ mask, ...vectors }, masks) {
  const data = Uint8Array.from(masks.flatMap((each) => [...each]));
  return { ...forImages(vectors, masks.length), mask: new Tensor("bool", data, [masks.length, mask.dims[1]]) };
}
