// Attention weights, and evidence, as the maps that viewer.js draws, as captioner/heatmap.py smooths them.
import { BICUBIC, filterLine, resampleMap } from "./resize.js";

export const MAP_SIZE = 28; // rows and columns of a map; the browser interpolates between them

// A map (rows, columns) of one word: weights, or evidence in nats.
//   displacement: offset between the centre of a region's receptive field and the centre of its cell, as a share of the
//   image's height and width.
//   unit: `peak` is counted in parts of 1 / unit: the number of regions for weights.
// Returns bytes: base64 of MAP_SIZE * MAP_SIZE bytes, the largest of which is 255, or all are 0; peak: the largest value,
// which that 255 stands for; of weights as a multiple of the weight of an even map.
export function mapBytes(values, rows, columns, displacement, unit = 1) {
  const [down, right] = [displacement[0] * rows, displacement[1] * columns];
  const [high, wide] = [rows + Math.ceil(down), columns + Math.ceil(right)]; // with edges repeated
  const padded = Array.from({ length: high * wide }, (_, place) => {
    const [row, column] = [Math.floor(place / wide), place % wide];
    return values[Math.min(row, rows - 1) * columns + Math.min(column, columns - 1)];
  });
  const smooth = resampleMap(
    padded,
    wide,
    filterLine(BICUBIC, high, MAP_SIZE, down, down + rows),
    filterLine(BICUBIC, wide, MAP_SIZE, right, right + columns),
  );
  const top = Math.max(...smooth) || 1;
  const bytes = smooth.map((value) => Math.round(255 * Math.max(0, value / top)));
  return { bytes: btoa(String.fromCharCode(...bytes)), peak: Math.max(...values) * unit };
}
