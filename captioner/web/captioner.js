// Photos in, captions out, as captioner/api.py does it in the library.
import { Engine } from "./engine.js";
import { mapBytes } from "./heatmap.js";
import { fetchBytes, readModel } from "./modelfile.js";
import { networkInput, previewOf, readPhoto } from "./photo.js";
import { END, beamSearch } from "./search.js";

const SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"];

export class Captioner {
  // `progress` is called with the bytes of the model that have come and with all of them.
  static async load(progress) {
    const captioner = new Captioner();
    captioner.search = (await (await fetch("settings.json")).json()).search;
    const { texts, weight } = readModel(await fetchBytes("model.safetensors", progress));
    captioner.words = [...SPECIAL, ...texts.vocabulary];
    captioner.preprocessing = texts.preprocessing;
    captioner.grid = texts.model.grid;
    captioner.about = texts.about;
    captioner.displacement = texts.preprocessing.size.map((pixels) => texts.graphs.displacement / pixels);
    captioner.engine = await Engine.load(texts.graphs, weight);
    return captioner;
  }

  // What viewer.js shows. Without a photo, a Blob, the previous one is captioned again; `hidden`: numbers of regions.
  async caption(photo, hidden) {
    let preview = null;
    if (photo) {
      const bitmap = await readPhoto(photo);
      const size = this.preprocessing.size;
      this.annotations = await this.engine.annotate(networkInput(bitmap, this.preprocessing), [1, 3, ...size]);
      preview = await previewOf(bitmap);
      this.size = { width: preview.width, height: preview.height };
    }
    const mask = new Uint8Array(this.annotations.dims[1]).fill(1);
    hidden.forEach((region) => (mask[region] = 0));
    const found = await beamSearch(this.engine, this.annotations, mask, this.search);
    return {
      preview: preview && preview.blob,
      ...this.size,
      hidden,
      grid: this.grid,
      displacement: this.displacement,
      heads: this.engine.heads,
      regions: mask.length,
      captions: found.map((each) => this.describe(each)),
    };
  }

  // A hypothesis of the search: its text, its confidence, its words with their maps (first the mean over the heads).
  describe({ words, logProbabilities, alphas }) {
    const [rows, columns] = this.grid;
    const shown = words.filter((word) => word !== END).map((word) => this.words[word]);
    const total = logProbabilities.reduce((sum, each) => sum + each, 0);
    return {
      text: sentence(shown),
      logProbability: total,
      confidence: Math.exp(total / words.length),
      words: shown.map((word, number) => {
        const heads = this.engine.headsOf(alphas[number]);
        const maps = heads.length > 1 ? [mean(heads), ...heads] : heads;
        return {
          word,
          probability: Math.exp(logProbabilities[number]),
          maps: maps.map((weights) => mapBytes(weights, rows, columns, this.displacement)),
        };
      }),
    };
  }
}

const mean = (maps) => maps[0].map((_, region) => maps.reduce((sum, map) => sum + map[region], 0) / maps.length);

// The words as a sentence: no space before punctuation or a split-off 's, a capital, a full stop.
export function sentence(words) {
  const text = words
    .join(" ")
    .replace(/ (n't|'\w+|[.,!?;:%])(?=\s|$)/g, "$1")
    .replace(/\b(can|gon|wan) (not|na)\b/g, "$1$2");
  return text && `${text[0].toUpperCase()}${text.slice(1)}.`;
}
