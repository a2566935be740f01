// The network computes here, beside the page, which stays responsive meanwhile.
import { Captioner } from "./captioner.js";

const captioner = Captioner.load((loaded, size) => postMessage({ loaded, size }));
captioner.then(
  ({ about }) => postMessage({ ready: about }),
  (error) => postMessage({ error: `The network cannot be loaded: ${error.message}` }),
);

async function answer({ number, photo, hidden }) {
  try {
    postMessage({ number, result: await (await captioner).caption(photo, hidden) });
  } catch (error) {
    postMessage({ number, error: error.message });
  }
}

let last = captioner.catch(() => {});
onmessage = ({ data }) => (last = last.then(() => answer(data))); // one after the other
