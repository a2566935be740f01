// The network computes here, beside the page, which stays responsive meanwhile.
import { Captioner } from "./captioner.js";

const captioner = Captioner.load((loaded, size) => postMessage({ loaded, size }));
captioner.then(
  ({ about }) => postMessage({ ready: about }),
  (error) => postMessage({ error: `The network cannot be loaded: ${error.message}` }),
);

let newest = 0; // the number of the latest question; no evidence is measured for others

async function answer({ number, measure, photo, hidden }) {
  const wanted = () => new Promise((done) => setTimeout(() => done(number === newest))); // newer ones come in first
  try {
    const network = await captioner;
    const result = measure ? await network.measure(wanted) : await network.caption(photo, hidden);
    if (result) postMessage({ number, measure, result });
  } catch (error) {
    postMessage({ number, error: error.message });
  }
}

let last = captioner.catch(() => {});
onmessage = ({ data }) => {
  newest = data.number;
  last = last.then(() => answer(data)); // one after the other
};
