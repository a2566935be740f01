// The network, computed by ONNX Runtime in WebAssembly; the methods of captioner/engine.py.
import * as ort from "./onnxruntime/ort.js";
import { fetchBytes, inflate } from "./modelfile.js";

export class Engine {
  // `graphs`: the header's text of that name. `weight` gives the weight of a name.
  static async load(graphs, weight) {
    ort.env.wasm.numThreads = 1; // more would need headers that a plain web space does not send
    ort.env.wasm.wasmBinary = await inflate(await fetchBytes("onnxruntime/ort.wasm.zlib"));
    const engine = new Engine();
    engine.sessions = {};
    for (const part of ["annotate", "encode", "step"]) {
      const { model, weights } = graphs[part];
      const graph = await inflate(Uint8Array.from(atob(model), (letter) => letter.charCodeAt(0)));
      // In a graph each weight is a file of its own, which has the weight's name.
      const externalData = weights.map((name) => ({ path: name, data: new Uint8Array(weight(name).buffer) }));
      engine.sessions[part] = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData });
    }
    return engine;
  }

  // The annotation vectors, (1, regions, channels), of one image.
  async annotate(values, shape) {
    return (await this.sessions.annotate.run({ images: new ort.Tensor("float32", values, shape) })).annotations;
  }

  // What every step reads, and the state before the first word. `mask`: 1 where a region is visible, 0 elsewhere, of one
  // image after the other.
  async encode(annotations, mask) {
    const given = { annotations, mask: new ort.Tensor("bool", mask, annotations.dims.slice(0, 2)) };
    const memory = { ...given };
    const state = {};
    for (const [name, tensor] of Object.entries(await this.sessions.encode.run(given))) {
      if (name.startsWith("next_")) state[name.slice(5)] = tensor;
      else memory[name] = tensor;
    }
    return { memory, state };
  }

  // Read one word of each caption: of one image, or one of each image. Gives, by caption, the scores of the next word and
  // the attention weights of all heads, and the state after it.
  async step(memory, state, tokens) {
    const images = memory.mask.dims[0];
    const ids = new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [images, tokens.length / images]);
    const { logits, alpha, ...rest } = await this.sessions.step.run({ ...memory, ...state, tokens: ids });
    this.heads = alpha.dims[2];
    const next = Object.entries(rest).filter(([name]) => name.startsWith("next_"));
    return {
      logits: tokens.map((_, row) => rowOf(logits, row)),
      alphas: tokens.map((_, row) => rowOf(alpha, row)),
      state: Object.fromEntries(next.map(([name, tensor]) => [name.slice(5), tensor])),
    };
  }

  // The weights of each head.
  headsOf(alpha) {
    const regions = alpha.length / this.heads;
    return Array.from({ length: this.heads }, (_, head) => alpha.slice(head * regions, (head + 1) * regions));
  }
}

// Tensor (images, rows, ...) -> the values of one row of all.
function rowOf(tensor, row) {
  const size = tensor.data.length / (tensor.dims[0] * tensor.dims[1]);
  return tensor.data.slice(row * size, (row + 1) * size);
}

// State with tensors (1, rows, ...) -> the rows named.
export function chooseRows(state, rows) {
  const choose = (tensor) => {
    const chosen = rows.map((row) => rowOf(tensor, row));
    const data = new Float32Array(tensor.data.length / tensor.dims[1] * rows.length);
    chosen.forEach((values, place) => data.set(values, place * values.length));
    return new ort.Tensor("float32", data, [1, rows.length, ...tensor.dims.slice(2)]);
  };
  return Object.fromEntries(Object.entries(state).map(([name, tensor]) => [name, choose(tensor)]));
}

// A state or memory with tensors (1, ...) -> the same for each of several images.
export function forImages(state, images) {
  const repeat = (tensor) => {
    const data = new Float32Array(images * tensor.data.length);
    for (let image = 0; image < images; image++) data.set(tensor.data, image * tensor.data.length);
    return new ort.Tensor("float32", data, [images, ...tensor.dims.slice(1)]);
  };
  return Object.fromEntries(Object.entries(state).map(([name, tensor]) => [name, repeat(tensor)]));
}
