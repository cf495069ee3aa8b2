// The page: a picture in, bars and a map out. Everything it loads comes from its own server.
const $ = (id) => document.getElementById(id);
const MAP_SIZE = 8; // the network's last maps are 8 by 8
const VEIL = [38, 48, 66]; // over what is no evidence: dark on light pictures, light on dark ones
const DENSEST = 0.8; // of the veil

let asked; // the request under way; a newer picture takes its place
let classes = []; // the answer, likeliest first

async function look(file) {
  asked?.abort();
  asked = new AbortController();
  const { signal } = asked;
  clear();
  show(file);
  const limit = Number(document.body.dataset.maxBytes);
  if (file.size > limit - 4096) {
    return fail(`${file.name} is larger than ${Math.floor(limit / 2 ** 20)} MiB; choose a smaller picture`);
  }
  $("status").textContent = "Looking …";
  try {
    answer(await ask(file, signal));
  } catch (error) {
    if (!signal.aborted) fail(error.message);
  }
}

async function ask(file, signal) {
  const body = new FormData();
  body.append("image", file);
  let response, content;
  try {
    response = await fetch("v1/predict?top=10&maps=true", { method: "POST", body, signal });
    content = await response.json();
  } catch (error) {
    throw new Error("The server does not answer; is it still running?", { cause: error });
  }
  if (!response.ok) throw new Error(content.detail);
  return content.predictions[0].classes;
}

function clear() {
  classes = [];
  for (const id of ["status", "problem", "caption"]) $(id).textContent = "";
  for (const id of ["classes", "tools", "map"]) $(id).hidden = true;
  document.body.classList.remove("answered");
}

function show(file) {
  const picture = $("picture");
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(file);
  picture.alt = "";
  picture.hidden = false;
  $("blind").hidden = true;
  picture.onerror = () => {
    picture.hidden = true;
    $("blind").hidden = classes.length === 0;
    if (classes.length) paint();
  };
  $("invitation").hidden = true;
  $("square").classList.add("full");
  $("choose").textContent = "Choose another";
}

function fail(message) {
  clear();
  $("problem").textContent = message[0].toUpperCase() + message.slice(1);
  $("picture").hidden = true;
  $("invitation").hidden = false;
  $("square").classList.remove("full");
  $("choose").textContent = "Choose a picture";
}

function answer(found) {
  classes = found;
  const [best] = classes;
  const name = document.createElement("b");
  name.textContent = best.name;
  $("status").replaceChildren("Most likely ", name, `, ${percent(best.probability)}`);
  $("picture").alt = `Your picture; most likely ${best.name}`;
  $("blind").hidden = !$("picture").hidden;
  $("rows").replaceChildren(...classes.map(row));
  for (const id of ["classes", "tools"]) $(id).hidden = false;
  document.body.classList.add("answered");
  // In the next frame, so that the bars grow.
  requestAnimationFrame(() => {
    document.querySelectorAll(".track i").forEach((bar, index) => {
      bar.style.width = `${100 * classes[index].probability}%`;
    });
  });
  paint();
}

function row(one, index) {
  const made = $("row").content.cloneNode(true);
  made.querySelector(".name").textContent = one.name;
  made.querySelector(".share").textContent = percent(one.probability);
  const radio = made.querySelector("input");
  radio.value = index;
  radio.checked = index === 0;
  return made;
}

function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${(100 * share).toFixed(1)} %`;
}

// One scale for all classes, so that their maps can be compared.
function paint() {
  const chosen = classes[document.querySelector("[name=class]:checked")?.value ?? 0];
  const most = Math.max(...classes.flatMap((one) => one.map.flat()));
  const evidence = chosen.map.flat().map((value) => Math.max(0, value) / (most || 1));
  const none = evidence.every((value) => value < 0.02);
  const on = $("shown").checked && !$("picture").hidden;
  $("caption").textContent = !on
    ? ""
    : none
      ? `Nothing in the picture speaks for ${chosen.name}.`
      : `The picture is clear where it speaks for ${chosen.name}.`;
  const canvas = $("map");
  canvas.hidden = !on;
  if (on) draw(canvas, evidence);
}

function draw(canvas, evidence) {
  const small = document.createElement("canvas");
  small.width = small.height = MAP_SIZE;
  const pixels = new ImageData(MAP_SIZE, MAP_SIZE);
  evidence.forEach((value, index) => {
    pixels.data.set([...VEIL, 255 * DENSEST * (1 - value ** 0.8)], 4 * index);
  });
  small.getContext("2d").putImageData(pixels, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

// Three ways in: choose, drop, paste.
$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) look(target.files[0]);
  target.value = ""; // the same file may be chosen again
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) look(file);
  else fail("That was no file; save the picture first, then drop it here");
});
addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) look(file);
});
$("classes").addEventListener("change", paint);
$("shown").addEventListener("change", paint);
