// Pillow's resampling. What a canvas computes differs between browsers, and captions with it.

// Filters as functions of the distance, zero beyond their support.
export const BILINEAR = { support: 1, value: (x) => Math.max(0, 1 - Math.abs(x)) };
export const BICUBIC = {
  support: 2,
  value: (x) => {
    const [a, d] = [-0.5, Math.abs(x)];
    if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
    return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
  },
};

// For each of `outputs` samples from the interval `begin` to `end` of a line of `inputs` samples: the first input that it
// is computed from, and the weights of that and the following ones. Where the line becomes shorter, the filter becomes
// wider, so that every input counts (antialiasing).
export function filterLine(filter, inputs, outputs, begin = 0, end = inputs) {
  const scale = (end - begin) / outputs;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: outputs }, (_, output) => {
    const centre = begin + (output + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - filter.support * stretch + 0.5));
    const last = Math.min(inputs, Math.trunc(centre + filter.support * stretch + 0.5));
    const weights = Array.from({ length: last - first }, (_, k) => filter.value((first + k - centre + 0.5) / stretch));
    const sum = weights.reduce((one, other) => one + other, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

// Bytes are resampled in whole numbers: weights of 22 binary places, a result that is rounded and kept within a byte.
const PLACES = 22;

export function fixedPoint(line) {
  return line.map(({ first, weights }) => ({
    first,
    weights: weights.map((weight) => Math.trunc(weight * 2 ** PLACES + (weight < 0 ? -0.5 : 0.5))),
  }));
}

// Resample one line of bytes: `read(input)` gives a sample, `write(output, byte)` takes one.
export function resampleBytes(line, read, write) {
  line.forEach(({ first, weights }, output) => {
    let sum = 2 ** (PLACES - 1);
    for (let k = 0; k < weights.length; k++) sum += weights[k] * read(first + k);
    write(output, Math.max(0, Math.min(255, sum >> PLACES)));
  });
}

// Resample a map, (rows, columns) numbers, to (height, width); `down` and `across` are lines of a filter.
export function resampleMap(values, columns, down, across) {
  const rows = values.length / columns;
  const narrow = Array.from({ length: rows }, (_, row) =>
    across.map(({ first, weights }) => dot(weights, (k) => values[row * columns + first + k])),
  );
  return down.flatMap(({ first, weights }) => across.map((_, x) => dot(weights, (k) => narrow[first + k][x])));
}

const dot = (weights, value) => weights.reduce((sum, weight, k) => sum + weight * value(k), 0);
