// The page: photos come in, the worker captions them, the viewer shows what it found.
import { viewer } from "./viewer.js";
import { MAP_SIZE } from "./heatmap.js";

const byId = (id) => document.getElementById(id);
const { colours } = await (await fetch("settings.json")).json();
const props = { tables: colours, map_size: MAP_SIZE, measures: true, value: null };
let show; // draws props.value
let choosing = false; // a photo is on its way; the regions shown are another's
let measuring = false; // whether evidence is measured for each caption: once people have asked for it
viewer(byId("viewer"), props, (_, draw) => (show = draw), (_, { regions, evidence }) => {
  measuring = evidence;
  if (!choosing) ask({ hidden: regions });
});

const worker = new Worker("worker.js", { type: "module" });
let ready = false;
let latest = 0; // the number of the latest question; answers to others are dropped
let asked = 0; // when it was asked, or evidence was, in milliseconds

function report(status, error = "") {
  byId("status").textContent = status;
  byId("error").textContent = error;
}

// Ask for the caption of a photo, a Blob; of the same photo as before where none is given.
function ask(question) {
  latest += 1;
  asked = performance.now();
  if (ready) report("Captioning.");
  worker.postMessage({ number: latest, ...question });
}

function choose(photo) {
  choosing = true;
  ask({ photo, hidden: [] });
}

worker.onmessage = ({ data }) => {
  if (data.loaded) {
    report(`Loading the network: ${megabytes(data.loaded)} of ${megabytes(data.size)} MB.`);
  } else if (data.ready) {
    ready = true;
    asked = performance.now(); // a photo may have been waiting
    report(latest ? "Captioning." : "Ready. Choose a photo.");
    byId("about").textContent = data.ready.trained_on ? `The model was trained on ${data.ready.trained_on}.` : "";
  } else if (data.number === undefined || data.number === latest) {
    choosing = false;
    if (data.error) report("", data.error);
    else answer(data);
  }
};
worker.onerror = () => report("", "This browser cannot run the network.");

const megabytes = (bytes) => Math.round(bytes / 1e6);

// What was found for a photo that was chosen, which comes with a preview, or for the previous one. `measure`: evidence
// has come to what is shown already.
function answer({ measure, result: { preview, measured, ...result } }) {
  const before = props.value && props.value.results[0].photo;
  if (preview && before) URL.revokeObjectURL(before);
  const photo = preview ? URL.createObjectURL(preview) : before;
  props.value = { results: [{ model: "Caption", ...result, photo }], asked: preview ? latest : props.value.asked };
  show();
  const [{ text }] = result.hidden || result.captions;
  const seconds = ((performance.now() - asked) / 1000).toFixed(1);
  report(`${text} ${measure ? "What it used was measured" : "Captioned"} on this device in ${seconds} seconds.`);
  if (measuring && !measured) {
    asked = performance.now();
    worker.postMessage({ number: latest, measure: true });
  }
}

for (const input of [byId("file"), byId("camera")]) {
  input.onchange = () => {
    if (input.files.length) choose(input.files[0]);
    input.value = ""; // so that the same photo can be chosen again
  };
}
for (const button of document.querySelectorAll(".sample")) {
  button.onclick = async () => choose(await (await fetch(button.querySelector("img").src)).blob());
}
document.addEventListener("paste", ({ clipboardData }) => {
  if (clipboardData.files.length) choose(clipboardData.files[0]);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
});
