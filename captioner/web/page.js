// The page: photos come in, the worker captions them, the viewer shows what it found.
import { viewer } from "./viewer.js";
import { MAP_SIZE } from "./heatmap.js";

const byId = (id) => document.getElementById(id);
const { colours } = await (await fetch("settings.json")).json();
const props = { tables: colours, map_size: MAP_SIZE, value: null };
let show; // draws props.value
viewer(byId("viewer"), props, (_, draw) => (show = draw));

const worker = new Worker("worker.js", { type: "module" });
let ready = false;
let latest = 0; // the number of the latest question; answers to others are dropped
let asked = 0; // when it was asked, in milliseconds

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
  hidden.clear();
  ask({ photo, hidden: [] });
}

worker.onmessage = ({ data }) => {
  if (data.loaded) {
    report(`Loading the network: ${megabytes(data.loaded)} of ${megabytes(data.size)} MB.`);
  } else if (data.ready) {
    ready = true;
    report(latest ? "Captioning." : "Ready. Choose a photo.");
    byId("about").textContent = data.ready.trained_on ? `The model was trained on ${data.ready.trained_on}.` : "";
  } else if (data.number === undefined || data.number === latest) {
    if (data.error) report("", data.error);
    else answer(data.result);
  }
};
worker.onerror = () => report("", "This browser cannot run the network.");

const megabytes = (bytes) => Math.round(bytes / 1e6);

function answer({ preview, grid, ...result }) {
  if (preview) {
    if (props.value) URL.revokeObjectURL(props.value.results[0].photo);
    result.photo = URL.createObjectURL(preview);
  } else {
    result.photo = props.value.results[0].photo;
  }
  props.value = { results: [{ model: "Caption", ...result }] };
  show();
  const seconds = ((performance.now() - asked) / 1000).toFixed(1);
  report(`${result.captions[0].text} Captioned on this device in ${seconds} seconds.`);
  if (preview) drawRegions(result, grid);
}

// Regions that the network must not look at. Their buttons are one stop of the tab key; arrow keys move among them.
const hidden = new Set();

function drawRegions({ photo, width, height }, [rows, columns]) {
  const board = document.querySelector(".regions");
  board.style.backgroundImage = `url(${photo})`;
  board.style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
  board.style.aspectRatio = `${width} / ${height}`;
  board.replaceChildren(
    ...Array.from({ length: rows * columns }, (_, region) => {
      const button = document.createElement("button");
      button.type = "button";
      button.tabIndex = region ? -1 : 0;
      button.ariaPressed = "false";
      button.ariaLabel = `Row ${Math.floor(region / columns) + 1}, column ${(region % columns) + 1}`;
      button.onclick = () => hide(hidden.has(region) ? [...hidden].filter((each) => each !== region) : [...hidden, region]);
      button.onkeydown = (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
        const next = board.children[region + step];
        if (!next) return;
        event.preventDefault();
        button.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      };
      return button;
    }),
  );
  byId("hide").hidden = false;
}

function hide(regions) {
  const buttons = [...document.querySelectorAll(".regions button")];
  if (regions.length === buttons.length) return; // the network has to look somewhere
  hidden.clear();
  regions.forEach((region) => hidden.add(region));
  buttons.forEach((button, region) => (button.ariaPressed = String(hidden.has(region))));
  ask({ hidden: regions });
}

byId("show-all").onclick = () => hide([]);

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
