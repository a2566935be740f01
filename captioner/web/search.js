// Beam search with the rules of captioner/search.py, for one photo.
import { chooseRows } from "./engine.js";

const [PAD, START, UNKNOWN] = [0, 1, 3];
export const END = 2;

// Returns the captions that score best, the best first, as hypotheses:
//   words: ids, END last where the caption ended.
//   logProbabilities: of each word given those before it.
//   alphas: the attention weights of each word, of all heads.
//   score: log-probability divided by the length to the power of the length penalty.
export async function beamSearch(engine, annotations, mask, options) {
  const { memory, state: first } = await engine.encode(annotations, mask);
  let state = first;
  let beams = [{ words: [], logProbabilities: [], alphas: [], total: 0, score: 0 }];
  for (let length = 1; length <= options.max_length; length++) {
    const growing = beams.filter((beam) => !hasEnded(beam));
    if (!growing.length) break;
    const step = await engine.step(memory, state, growing.map(({ words }) => words.at(-1) ?? START));
    // What has ended competes with what goes on.
    const candidates = beams.filter(hasEnded);
    growing.forEach((beam, row) => {
      const logProbabilities = logSoftmax(allowed(step.logits[row], beam.words, options.block_ngrams));
      for (const word of largest(logProbabilities, options.beam_size)) {
        const total = beam.total + logProbabilities[word];
        candidates.push({
          words: [...beam.words, word],
          logProbabilities: [...beam.logProbabilities, logProbabilities[word]],
          alphas: [...beam.alphas, step.alphas[row]],
          total,
          score: total / length ** options.length_penalty,
          row,
        });
      }
    });
    beams = candidates.sort((one, other) => other.score - one.score).slice(0, options.beam_size);
    state = chooseRows(step.state, beams.filter((beam) => !hasEnded(beam)).map(({ row }) => row));
  }
  return beams;
}

// The steps before each word of a caption that is given: teacher forcing.
//   mask: 1 where a region is visible. words: ids.
// Returns for each word:
//   state, token: what the step was computed from, the token being the word before.
//   logProbabilityOf: the word's log-probability by the logits of such a step.
//   logProbability: that by this one.
export async function stepsOf(engine, annotations, mask, words) {
  const { memory, state: first } = await engine.encode(annotations, mask);
  let state = first;
  const steps = [];
  for (const [t, word] of words.entries()) {
    const token = t ? words[t - 1] : START;
    const logProbabilityOf = (logits) => logSoftmax(allowed(logits, words.slice(0, t), 0))[word];
    const step = await engine.step(memory, state, [token]);
    steps.push({ state, token, logProbabilityOf, logProbability: logProbabilityOf(step.logits[0]) });
    state = step.state;
  }
  return steps;
}

const hasEnded = ({ words }) => words.at(-1) === END;

// The scores of the next word with what must not come next ruled out: special words, an empty caption, and a word that
// would repeat a run of `blockNgrams` words.
function allowed(logits, words, blockNgrams) {
  for (const special of words.length ? [PAD, START, UNKNOWN] : [PAD, START, UNKNOWN, END]) logits[special] = -Infinity;
  if (blockNgrams > 0) {
    const latest = words.slice(words.length - blockNgrams + 1); // the n - 1 words that a run would continue
    for (let end = blockNgrams - 1; end < words.length; end++) {
      if (latest.every((word, k) => words[end - blockNgrams + 1 + k] === word)) logits[words[end]] = -Infinity;
    }
  }
  return logits;
}

function logSoftmax(logits) {
  const top = logits.reduce((one, other) => Math.max(one, other));
  const normaliser = top + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - top), 0));
  return logits.map((logit) => logit - normaliser);
}

// The places of the largest values, the largest first; none where a value is -Infinity.
function largest(values, count) {
  const found = [];
  values.forEach((value, place) => {
    if (value === -Infinity || (found.length === count && value <= values[found.at(-1)])) return;
    found.push(place);
    found.sort((one, other) => values[other] - values[one]);
    found.splice(count);
  });
  return found;
}
