// Photos in, captions out, as captioner/api.py does it in the library.
import { Engine } from "./engine.js";
import { measureEvidence } from "./evidence.js";
import { mapBytes } from "./heatmap.js";
import { fetchBytes, readModel } from "./modelfile.js";
import { networkInput, previewOf, readPhoto } from "./photo.js";
import { END, beamSearch } from "./search.js";

const SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"];

export class Captioner {
  // `progress` is called with the bytes of the model that have come and with all of them.
  static async load(progress) {
    const captioner = new Captioner();
    captioner.settings = await (await fetch("settings.json")).json();
    const { texts, weight } = readModel(await fetchBytes("model.safetensors", progress));
    captioner.words = [...SPECIAL, ...texts.vocabulary];
    captioner.preprocessing = texts.preprocessing;
    captioner.grid = texts.model.grid;
    captioner.about = texts.about;
    captioner.displacement = texts.preprocessing.size.map((pixels) => texts.graphs.displacement / pixels);
    captioner.engine = await Engine.load(texts.graphs, weight);
    return captioner;
  }

  // Caption a photo, a Blob, or the previous one where none is given, without the `hidden` regions, which are numbers.
  // Gives what viewer.js shows, and for a photo its preview.
  async caption(photo, hidden) {
    let preview = null;
    if (photo) {
      const bitmap = await readPhoto(photo);
      const size = this.preprocessing.size;
      this.annotations = await this.engine.annotate(networkInput(bitmap, this.preprocessing), [1, 3, ...size]);
      preview = await previewOf(bitmap);
      this.size = { width: preview.width, height: preview.height };
      [this.whole, this.without] = [await this.read([]), null];
    }
    if (String(hidden) !== String((this.without || this.whole).hidden)) {
      this.without = hidden.length ? await this.read(hidden) : null;
    }
    return { preview: preview && preview.blob, ...this.shown() };
  }

  // The captions of the photo without the hidden regions.
  async read(hidden) {
    const mask = new Uint8Array(this.annotations.dims[1]).fill(1);
    hidden.forEach((region) => (mask[region] = 0));
    const found = await beamSearch(this.engine, this.annotations, mask, this.settings.search);
    return { hidden, mask, words: found[0].words.filter(isWord), captions: found.map((each) => this.describe(each)) };
  }

  // What viewer.js shows, and whether evidence is measured.
  shown() {
    return {
      ...this.size,
      grid: this.grid,
      displacement: this.displacement,
      heads: this.engine.heads,
      regions: this.annotations.dims[1],
      captions: this.whole.captions,
      hidden: this.without && this.without.captions,
      hidden_regions: this.without ? this.without.hidden.length : 0,
      measured: [this.whole, this.without].every((each) => !each || each.measured),
    };
  }

  // Add evidence to the words of the captions, not to those of their alternatives. Gives what viewer.js shows; null
  // where `wanted`, see evidence.js, ends it.
  async measure(wanted) {
    const { grid, displacement, settings } = this;
    for (const each of [this.whole, this.without].filter((one) => one && !one.measured)) {
      const options = { grid, window: settings.evidence_window, wanted };
      const evidence = await measureEvidence(this.engine, this.annotations, each.mask, each.words, options);
      if (!evidence) return null;
      each.captions[0].words.forEach((word, number) => (word.evidence = mapBytes(evidence[number], ...grid, displacement)));
      each.measured = true;
    }
    return this.shown();
  }

  // A hypothesis of the search: its text, its confidence, its words with their maps (first the mean over the heads).
  describe({ words, logProbabilities, alphas }) {
    const shown = words.filter(isWord).map((word) => this.words[word]);
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
          maps: maps.map((weights) => mapBytes(weights, ...this.grid, this.displacement, weights.length)),
        };
      }),
    };
  }
}

const isWord = (word) => word !== END;

const mean = (maps) => maps[0].map((_, region) => maps.reduce((sum, map) => sum + map[region], 0) / maps.length);

// The words as a sentence: no space before punctuation or a split-off 's, a capital, a full stop.
export function sentence(words) {
  const text = words
    .join(" ")
    .replace(/ (n't|'\w+|[.,!?;:%])(?=\s|$)/g, "$1")
    .replace(/\b(can|gon|wan) (not|na)\b/g, "$1$2");
  return text && `${text[0].toUpperCase()}${text.slice(1)}.`;
}
