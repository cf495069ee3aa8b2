// The demo page, which sends an image and shows the class probabilities and a class activation map.
const $ = (id) => document.getElementById(id);
const MAP_SIZE = 8; // the model's activation maps are 8x8
const OVERLAY_COLOR = [38, 48, 66]; // visible on light and on dark images
const MAX_OPACITY = 0.8; // opacity of the overlay where the map shows no evidence
const FORM_BYTES = 4096; // upper bound on the size of a form without its file

let controller; // aborts the current request when the user chooses another image
let classes = []; // the current result, in descending order of probability

async function classify(file) {
  controller?.abort();
  controller = new AbortController();
  const { signal } = controller;
  clearResult();
  showImage(file);
  const limit = Number(document.body.dataset.maxBytes);
  if (file.size > limit - FORM_BYTES) {
    return showError(`${file.name} is larger than ${Math.floor(limit / 2 ** 20)} MiB; choose a smaller image`);
  }
  $("status").textContent = "Classifying …";
  try {
    showResult(await requestPrediction(file, signal));
  } catch (error) {
    if (!signal.aborted) showError(error.message);
  }
}

async function requestPrediction(file, signal) {
  const body = new FormData();
  body.append("image", file);
  let response, content;
  try {
    response = await fetch("v1/predict?top=10&maps=true", { method: "POST", body, signal });
    content = await response.json();
  } catch (error) {
    throw new Error("The server is not responding. Is it still running?", { cause: error });
  }
  if (!response.ok) throw new Error(content.detail);
  return content.predictions[0].classes;
}

function clearResult() {
  classes = [];
  for (const id of ["status", "error", "caption"]) $(id).textContent = "";
  for (const id of ["classes", "tools", "map"]) $(id).hidden = true;
  document.body.classList.remove("has-result");
}

function showImage(file) {
  const image = $("image");
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  image.alt = "";
  image.hidden = false;
  $("unsupported").hidden = true;
  image.onerror = () => {
    image.hidden = true;
    $("unsupported").hidden = classes.length === 0;
    if (classes.length) updateMap();
  };
  $("placeholder").hidden = true;
  $("square").classList.add("full");
  $("choose").textContent = "Choose another";
}

function showError(message) {
  clearResult();
  $("error").textContent = message[0].toUpperCase() + message.slice(1);
  $("image").hidden = true;
  $("placeholder").hidden = false;
  $("square").classList.remove("full");
  $("choose").textContent = "Choose an image";
}

function showResult(result) {
  classes = result;
  const [best] = classes;
  const name = document.createElement("b");
  name.textContent = best.name;
  $("status").replaceChildren("Most likely ", name, `, ${percent(best.probability)}`);
  $("image").alt = `Your image, most likely ${best.name}`;
  $("unsupported").hidden = !$("image").hidden;
  $("rows").replaceChildren(...classes.map(createRow));
  for (const id of ["classes", "tools"]) $(id).hidden = false;
  document.body.classList.add("has-result");
  // Set the widths in the next frame so that the transition runs.
  requestAnimationFrame(() => {
    document.querySelectorAll(".track i").forEach((bar, index) => {
      bar.style.width = `${100 * classes[index].probability}%`;
    });
  });
  updateMap();
}

function createRow({ name, probability }, index) {
  const row = $("row").content.cloneNode(true);
  row.querySelector(".name").textContent = name;
  row.querySelector(".probability").textContent = percent(probability);
  const radio = row.querySelector("input");
  radio.value = index;
  radio.checked = index === 0;
  return row;
}

function percent(fraction) {
  if (fraction > 0 && fraction < 0.001) return "< 0.1 %";
  return `${(100 * fraction).toFixed(1)} %`;
}

// The maps of all classes use the same scale, which makes them comparable.
function updateMap() {
  const selected = classes[document.querySelector("[name=class]:checked")?.value ?? 0];
  const maximum = Math.max(...classes.flatMap(({ map }) => map.flat()));
  const evidence = selected.map.flat().map((value) => Math.max(0, value) / (maximum || 1));
  const noEvidence = evidence.every((value) => value < 0.02);
  const visible = $("show-map").checked && !$("image").hidden;
  $("caption").textContent = !visible
    ? ""
    : noEvidence
      ? `No region of the image supports ${selected.name}.`
      : `The clear regions of the image support ${selected.name}.`;
  const canvas = $("map");
  canvas.hidden = !visible;
  if (visible) drawOverlay(canvas, evidence);
}

function drawOverlay(canvas, evidence) {
  const small = document.createElement("canvas");
  small.width = small.height = MAP_SIZE;
  const pixels = new ImageData(MAP_SIZE, MAP_SIZE);
  evidence.forEach((value, index) => {
    pixels.data.set([...OVERLAY_COLOR, 255 * MAX_OPACITY * (1 - value ** 0.8)], 4 * index);
  });
  small.getContext("2d").putImageData(pixels, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) classify(target.files[0]);
  target.value = ""; // Without this reset, choosing the same file again fires no event.
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("drag-over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("drag-over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("drag-over");
  const [file] = event.dataTransfer.files;
  if (file) classify(file);
  else showError("The dropped item is not a file; save the image first, then drop the file");
});
addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) classify(file);
});
$("classes").addEventListener("change", updateMap);
$("show-map").addEventListener("change", updateMap);
