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
  const variants = visible.map((region) => withoutWindow(mask, region, grid[1], Math.floor(window / 2)));
  const whole = await stepsOf(engine, annotations, mask, words);
  const without = words.map(() => []);
  for (let first = 0; first < variants.length; first += BATCH) {
    if (!(await wanted())) return null;
    const images = imagesOf(annotations, variants.slice(first, first + BATCH));
    const { memory } = await engine.encode(...images);
    for (const [place, { state, token, logProbabilityOf }] of whole.entries()) {
      const count = images[0].dims[0];
      const step = await engine.step(memory, forImages(state, count), new Array(count).fill(token));
      without[place].push(...step.logits.map(logProbabilityOf));
    }
  }
  return whole.map(({ logProbability }, place) => {
    const falls = new Float32Array(mask.length);
    visible.forEach((region, variant) => (falls[region] = Math.max(0, logProbability - without[place][variant])));
    return falls;
  });
}

// The mask with what is at most `reach` rows and columns away from a region hidden too.
function withoutWindow(mask, region, columns, reach) {
  const [row, column] = [Math.floor(region / columns), region % columns];
  return mask.map((visible, other) => {
    const away = Math.max(Math.abs(Math.floor(other / columns) - row), Math.abs((other % columns) - column));
    return away > reach ? visible : 0;
  });
}

// The annotation vectors once for each mask, and the masks in one array. Where a mask leaves nothing, the vectors are
// zero instead: no picture.
function imagesOf(annotations, masks) {
  const [, regions, channels] = annotations.dims;
  const data = new Float32Array(masks.length * regions * channels);
  const all = new Uint8Array(masks.length * regions).fill(1);
  masks.forEach((mask, image) => {
    if (!mask.some(Boolean)) return;
    data.set(annotations.data, image * regions * channels);
    all.set(mask, image * regions);
  });
  return [new Tensor("float32", data, [masks.length, regions, channels]), all];
}
