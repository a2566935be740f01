// A model's file as the library writes it: a header of texts in JSON, then the weights in float16.
// The format: https://github.com/huggingface/safetensors. Its texts: captioner/modelfile.py.

// `progress` is called with the bytes that have come and with all of them.
export async function fetchBytes(address, progress = () => {}) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address}: ${answer.status} ${answer.statusText}`);
  const size = Number(answer.headers.get("Content-Length"));
  const parts = [];
  let loaded = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Blob(parts).arrayBuffer();
    parts.push(value);
    loaded += value.length;
    progress(loaded, Math.max(loaded, size)); // a server that compresses gives a size that is too small, or none
  }
}

// Returns the header's texts, parsed, and a function that gives the weight of a name in float32.
export function readModel(file) {
  const start = 8 + Number(new DataView(file).getBigUint64(0, true));
  const { __metadata__: metadata, ...tensors } = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, start - 8)));
  const texts = Object.fromEntries(Object.entries(metadata).map(([name, text]) => [name, JSON.parse(text)]));
  const weight = (name) => {
    const [begin, end] = tensors[name].data_offsets;
    return new Float32Array(new Uint16Array(file.slice(start + begin, start + end))).map((bits) => HALF[bits]);
  };
  return { texts, weight };
}

// The value of each of the 65,536 patterns of 16 bits: one of sign, five of exponent, ten of fraction.
const HALF = new Float32Array(65536).map((_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  return exponent ? sign * (1 + fraction) * 2 ** (exponent - 15) : sign * fraction * 2 ** -14;
});

// What zlib compressed.
export async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
