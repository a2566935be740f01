// From a photo's file to what the network reads, as captioner/images.py does it.
import { BILINEAR, filterLine, fixedPoint, resampleBytes } from "./resize.js";

const STRIP = 64; // rows of a photo that are read from the canvas at a time
const PREVIEW = 720; // pixels: width of the photo on the page, which is at most twice as high

// The photo upright, its colours as they stand in the file.
export async function readPhoto(blob) {
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Error("This file is not a picture that the browser can read.");
  }
}

// RGB values, (height, width, 3) bytes: the whole photo resized, transparency on white.
export function resizePhoto(bitmap, width, height) {
  const across = fixedPoint(filterLine(BILINEAR, bitmap.width, width));
  const down = fixedPoint(filterLine(BILINEAR, bitmap.height, height));
  // First every row is resized, strip by strip: the pixels of a large photo would take hundreds of megabytes.
  const narrow = new Uint8Array(bitmap.height * width * 3);
  const context = onWhite(bitmap.width, Math.min(STRIP, bitmap.height));
  for (let top = 0; top < bitmap.height; top += STRIP) {
    const rows = Math.min(STRIP, bitmap.height - top);
    context.fillRect(0, 0, bitmap.width, rows);
    context.drawImage(bitmap, 0, -top);
    const pixels = context.getImageData(0, 0, bitmap.width, rows).data; // red, green, blue, opacity
    for (let row = 0; row < rows; row++) {
      for (let channel = 0; channel < 3; channel++) {
        const read = (x) => pixels[4 * (row * bitmap.width + x) + channel];
        resampleBytes(across, read, (x, byte) => (narrow[3 * ((top + row) * width + x) + channel] = byte));
      }
    }
  }
  const resized = new Uint8Array(height * width * 3);
  for (let place = 0; place < 3 * width; place++) {
    const read = (y) => narrow[y * 3 * width + place];
    resampleBytes(down, read, (y, byte) => (resized[y * 3 * width + place] = byte));
  }
  return resized;
}

// Float32 values (3, height, width): resized, and normalised with the mean and the deviation of each channel.
export function networkInput(bitmap, { size: [height, width], mean, std }) {
  const bytes = resizePhoto(bitmap, width, height);
  return new Float32Array(bytes.length).map((_, place) => {
    const channel = Math.floor(place / (height * width));
    const byte = bytes[3 * (place % (height * width)) + channel];
    return (byte - 255 * mean[channel]) / (255 * std[channel]);
  });
}

// A small JPEG of the photo for the page, with its size.
export async function previewOf(bitmap) {
  const scale = Math.min(1, PREVIEW / bitmap.width, (2 * PREVIEW) / bitmap.height);
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const context = onWhite(width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return { width, height, blob: await context.canvas.convertToBlob({ type: "image/jpeg", quality: 0.9 }) };
}

function onWhite(width, height) {
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  return context;
}
