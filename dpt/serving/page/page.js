// A picture is sent once for its map, as an array; colours and values under the mouse are made of that here. A download is asked for when
// it is wanted, and is predicted anew: the server keeps nothing, and gives the same bits again.

const LARGEST = 4096; // pixels of a canvas' longer side; values are read off the whole map all the same
const TAINT = 0.45; // of the picture, under the colours of classes
const TITLES = {
  png16: ["Depth, 16 bits", "PNG"], ply: ["Points", "PLY"], labels: ["Labels", "PNG"], colours: ["Coloured map", "PNG"],
  npy: ["Values", "NumPy"], json: ["Summary", "JSON"],
};
const MEANINGS = {
  "metres": "Metres from the camera.",
  "inverse depth": "Relative: the larger, the nearer, up to an unknown scale and shift. Not metres.",
  "relative depth": "Relative: the larger, the farther, up to an unknown scale and shift. Not metres.",
  "class": "The class of each pixel, and its share of the picture.",
  "normal": "Which way surfaces face: x right, y and z as the model was taught.",
};
const SIDES = { depth: "Depth", segmentation: "Labels", normals: "Normals" };
const at = (id) => document.getElementById(id);
const page = { server: null, shown: null, cursor: null, running: null };

// What is asked of the server.

async function ask(form, file, parameters, signal) {
  const body = new FormData();
  body.append("picture", file, file.name || "picture");
  let answer;
  try {
    answer = await fetch("predict?" + new URLSearchParams({ ...parameters, as: form }), { method: "POST", body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (!answer.ok) throw new Error(await reasonOf(answer));
  return answer;
}

async function reasonOf(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

// The array in a .npy file.
function arrayOf(buffer) {
  const length = new DataView(buffer).getUint16(8, true);
  const header = new TextDecoder("latin1").decode(new Uint8Array(buffer, 10, length));
  const kind = { "<f4": Float32Array, "|u1": Uint8Array, "<i2": Int16Array }[/'descr': '([^']+)'/.exec(header)[1]];
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((part) => part.trim()).map(Number);
  return { height: shape[0], width: shape[1], values: new kind(buffer, 10 + length) };
}

// From a file to what is shown.

async function show(file) {
  const limits = page.server.limits;
  page.running?.abort();
  say(null);
  if (file.size > limits.bytes) return fail(new Error(`${file.name}: ${size(file.size)}, and at most ${size(limits.bytes)} are taken.`));
  const running = (page.running = new AbortController());
  const task = taskOf(at("model").value, at("task").value);
  const parameters = { model: at("model").value, task: task.task };
  busy(`Predicting ${task.task === "segmentation" ? "labels" : task.task}…`);
  const local = createImageBitmap(file, { imageOrientation: "from-image" }).catch(() => null);
  try {
    const early = await Promise.race([local, new Promise((done) => setTimeout(done, 400))]);
    if (early && !running.signal.aborted) frame(early, early.width, early.height);
    const map = arrayOf(await (await ask("npy", file, parameters, running.signal)).arrayBuffer());
    let picture = await local;
    if (!picture || picture.width !== map.width || picture.height !== map.height) { // the server reads more kinds of files
      picture = await createImageBitmap(await (await ask("picture", file, parameters, running.signal)).blob());
    }
    if (running.signal.aborted) return;
    frame(picture, map.width, map.height);
    present(file, task, parameters, map);
  } catch (error) {
    if (error.name === "AbortError" || running !== page.running) return;
    if (page.shown) redraw(page.shown);
    else turn(false);
    fail(error);
  } finally {
    if (running === page.running) busy(null);
  }
}

function frame(picture, width, height) {
  const scale = Math.min(1, LARGEST / Math.max(width, height));
  at("stage").style.setProperty("--ratio", width / height);
  at("slider").style.setProperty("--ratio", width / height);
  for (const id of ["picture", "map"]) {
    at(id).width = Math.max(1, Math.round(width * scale));
    at(id).height = Math.max(1, Math.round(height * scale));
  }
  at("picture").getContext("2d").drawImage(picture, 0, 0, at("picture").width, at("picture").height);
  turn(true);
}

// To what is shown, or back to where a picture is dropped.
function turn(shown) {
  at("drop").hidden = shown;
  at("result").hidden = at("another").hidden = !shown;
}

function present(file, task, parameters, map) {
  const shown = (page.shown = { file, task, parameters, ...map, picture: null, ends: task.task === "depth" ? endsOf(map.values) : null });
  shown.picture = copyOf(at("picture"));
  page.cursor = null;
  point(null);
  draw(shown);
  at("found").hidden = false;
  at("name").textContent = file.name || "The picture";
  at("about").textContent = `${parameters.model} · ${map.width} × ${map.height} pixels`;
  at("side-map").textContent = SIDES[task.task];
  at("map").setAttribute("aria-label", `${SIDES[task.task]} of the picture, as colours`);
  at("value-title").textContent = { metres: "Distance", class: "Class", normal: "Normal" }[task.unit] || "Depth";
  at("meaning").textContent = MEANINGS[task.unit];
  legend(shown);
  downloads(task);
  document.body.dataset.state = "shown";
}

// What was shown before, once another picture could not be.
function redraw(shown) {
  frame(shown.picture, shown.width, shown.height);
  draw(shown);
}

function copyOf(canvas) {
  const copy = document.createElement("canvas");
  copy.width = canvas.width;
  copy.height = canvas.height;
  copy.getContext("2d").drawImage(canvas, 0, 0);
  return copy;
}

function endsOf(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

// 0 far to 1 near.
function nearness({ task, ends: [low, high] }, value) {
  const share = high > low ? (value - low) / (high - low) : 0;
  return task.inverse ? share : 1 - share;
}

function colourOf(shown) {
  const { task, values } = shown, colours = page.server.colours;
  if (task.task === "depth") return (index) => colours[Math.round(255 * nearness(shown, values[index]))] ?? colours[256];
  if (task.task === "segmentation") return (index) => task.palette[values[index]];
  return (index) => [0, 1, 2].map((axis) => Math.round((values[3 * index + axis] + 1) * 127.5));
}

function draw(shown) {
  const canvas = at("map"), context = canvas.getContext("2d"), colour = colourOf(shown);
  const pixels = context.createImageData(canvas.width, canvas.height);
  for (let y = 0, to = 0; y < canvas.height; y++) {
    const row = Math.floor(((y + 0.5) * shown.height) / canvas.height) * shown.width;
    for (let x = 0; x < canvas.width; x++, to += 4) {
      const [red, green, blue] = colour(row + Math.floor(((x + 0.5) * shown.width) / canvas.width));
      pixels.data[to] = red;
      pixels.data[to + 1] = green;
      pixels.data[to + 2] = blue;
      pixels.data[to + 3] = 255;
    }
  }
  context.putImageData(pixels, 0, 0);
  if (shown.task.task === "segmentation") {
    context.globalAlpha = TAINT;
    context.drawImage(at("picture"), 0, 0);
    context.globalAlpha = 1;
  }
}

// Values in words.

const short = (value) => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2) : value.toPrecision(4));

function worded({ task, values, width }, x, y) {
  const index = y * width + x;
  if (task.unit === "class") return task.classes[values[index]];
  if (task.unit === "normal") return [0, 1, 2].map((axis) => values[3 * index + axis].toFixed(2)).join(", ");
  return task.unit === "metres" ? `${short(values[index])} m` : `${task.unit} ${short(values[index])}`;
}

function legend(shown) {
  const { task, ends } = shown, metres = task.unit === "metres";
  at("scale").hidden = task.task !== "depth";
  at("classes").hidden = task.task !== "segmentation";
  if (task.task === "depth") {
    const [far, near] = task.inverse ? ends : [ends[1], ends[0]];
    const stops = page.server.colours.slice(0, 256).filter((_, index) => index % 15 === 0);
    at("bar").style.background = `linear-gradient(to right, ${stops.map((colour) => `rgb(${colour})`).join(",")})`;
    at("far").textContent = `far ${short(far)}${metres ? " m" : ""}`;
    at("near").textContent = `near ${short(near)}${metres ? " m" : ""}`;
  } else if (task.task === "segmentation") {
    const counts = new Map();
    for (const value of shown.values) counts.set(value, (counts.get(value) || 0) + 1);
    const items = [...counts].sort((one, other) => other[1] - one[1]).map(([index, count]) => {
      const item = document.createElement("li"), share = ((100 * count) / shown.values.length).toFixed(1);
      item.dataset.index = index;
      item.append(swatch(task.palette[index]), span(task.classes[index]), span(`${share} %`));
      return item;
    });
    at("classes").replaceChildren(...items);
  }
}

function span(text) {
  const made = document.createElement("span");
  made.textContent = text;
  return made;
}

function swatch(colour) {
  const canvas = document.createElementNS("http://www.w3.org/2000/svg", "svg"), square = document.createElementNS(canvas.namespaceURI, "rect");
  for (const [name, value] of [["width", 14], ["height", 14], ["aria-hidden", true]]) canvas.setAttribute(name, value);
  for (const [name, value] of [["width", 14], ["height", 14], ["fill", `rgb(${colour})`]]) square.setAttribute(name, value);
  canvas.append(square);
  return canvas;
}

// The value at a pixel of the map, and where it stands; null for none.
function point(pixel, spoken = true) {
  const shown = page.shown, mark = at("mark");
  page.cursor = pixel ?? page.cursor;
  at("tip").hidden = at("cross").hidden = mark.hidden = !pixel;
  for (const item of at("classes").children) item.classList.toggle("here", !!pixel && +item.dataset.index === shown.values[pixel.y * shown.width + pixel.x]);
  if (!pixel) {
    at("value").replaceChildren("–");
    return;
  }
  const text = worded(shown, pixel.x, pixel.y), place = document.createElement("small");
  place.textContent = `at column ${pixel.x}, row ${pixel.y}`;
  at("value").setAttribute("aria-live", spoken ? "polite" : "off");
  at("value").replaceChildren(text, place);
  at("tip").textContent = text;
  const left = (100 * (pixel.x + 0.5)) / shown.width, top = (100 * (pixel.y + 0.5)) / shown.height;
  Object.assign(at("cross").style, { left: `${left}%`, top: `${top}%` });
  Object.assign(at("tip").style, { left: `${left}%`, top: `${top}%` });
  at("tip").style.transform = `translate(${left > 60 ? "calc(-100% - 12px)" : "12px"}, ${top > 60 ? "calc(-100% - 8px)" : "8px"})`;
  if (shown.ends) mark.style.left = `${100 * nearness(shown, shown.values[pixel.y * shown.width + pixel.x])}%`;
}

function pixelAt(event) {
  const box = at("stage").getBoundingClientRect(), { width, height } = page.shown;
  const inside = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value)));
  return { x: inside(((event.clientX - box.left) * width) / box.width, width), y: inside(((event.clientY - box.top) * height) / box.height, height) };
}

// Downloads.

function downloads(task) {
  at("downloads").replaceChildren(...Object.keys(TITLES).filter((form) => form in task.formats).map((form) => {
    const button = document.createElement("button"), kind = document.createElement("small");
    kind.textContent = TITLES[form][1];
    button.type = "button";
    button.dataset.as = form;
    button.append(span(TITLES[form][0]), kind);
    button.addEventListener("click", () => download(button, form, task.formats[form]));
    return button;
  }));
}

async function download(button, form, suffix) {
  const { file, parameters } = page.shown;
  button.disabled = true;
  say(null);
  try {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await (await ask(form, file, parameters)).blob());
    link.download = `${(file.name || "picture").replace(/\.[^.]*$/, "")}_${parameters.model}${suffix}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } catch (error) {
    fail(error);
  } finally {
    button.disabled = false;
  }
}

// What is said.

function say(text) {
  at("error").textContent = text ?? "";
  at("error").hidden = text === null;
}

function fail(error) {
  say(error.message);
  document.body.dataset.state = "failed";
}

function busy(text) {
  at("busy").hidden = text === null;
  at("busy-text").textContent = text ?? "";
  at("stage").setAttribute("aria-busy", text !== null);
  at("choose").disabled = text !== null;
  at("choose").textContent = text ?? "choose a file";
  if (text !== null) document.body.dataset.state = "busy";
}

function size(bytes) {
  return bytes < 1 << 20 ? `${(bytes / 1024).toFixed(1)} KiB` : `${(bytes / (1 << 20)).toFixed(1)} MiB`;
}

// The choices.

function taskOf(model, task) {
  const tasks = page.server.models.find(({ name }) => name === model).tasks;
  return tasks.find((one) => one.task === task) ?? tasks[0];
}

function offerTasks() {
  const model = page.server.models.find(({ name }) => name === at("model").value);
  at("task").replaceChildren(...model.tasks.map(({ task }) => new Option(SIDES[task].toLowerCase(), task)));
  at("task-choice").hidden = model.tasks.length < 2;
  at("note").textContent = model.note ?? "";
  at("note").hidden = !model.note;
}

function offer(server) {
  page.server = server;
  at("model").replaceChildren(...server.models.map(({ name }) => new Option(name, name)));
  offerTasks();
  const { bytes, pixels } = server.limits, kinds = server.formats.map((kind) => (kind === "JPEG2000" ? "JPEG 2000" : kind));
  at("limits").textContent = `${kinds.join(", ")}; at most ${size(bytes)} and ${pixels < 1e6 ? pixels : +(pixels / 1e6).toPrecision(3) + " million"} pixels`;
  at("examples-part").hidden = !server.examples.length;
  at("examples").replaceChildren(...server.examples.map((name) => {
    const button = document.createElement("button"), image = new Image(120, 120);
    button.type = "button";
    image.src = `examples/${name}`;
    image.alt = `Example ${name}`;
    button.append(image);
    button.addEventListener("click", async () => show(new File([await (await fetch(image.src)).blob()], name)));
    return button;
  }));
}

function again() {
  if (page.shown) show(page.shown.file);
}

function connect() {
  const stage = at("stage"), slider = at("slider");
  const divide = (value) => {
    slider.value = value;
    stage.style.setProperty("--at", `${slider.value}%`);
    at("side-picture").hidden = slider.value < 15;
    at("side-map").hidden = slider.value > 85;
  };
  const take = (files) => {
    const file = [...files].find((one) => one.type.startsWith("image/")) ?? files[0];
    if (file) show(file);
  };
  slider.addEventListener("input", () => divide(slider.value));
  at("choose").addEventListener("click", () => at("file").click());
  at("another").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", () => {
    take(at("file").files);
    at("file").value = "";
  });
  at("model").addEventListener("change", () => (offerTasks(), again()));
  at("task").addEventListener("change", again);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    take(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => take(event.clipboardData.files));
  const readable = () => page.shown && at("busy").hidden;
  stage.addEventListener("pointermove", (event) => {
    if (!readable()) return;
    if (event.buttons & 1) divide((100 * (event.clientX - stage.getBoundingClientRect().left)) / stage.clientWidth);
    point(pixelAt(event), false);
  });
  stage.addEventListener("pointerdown", (event) => {
    if (readable()) point(pixelAt(event), false);
    if (event.pointerType === "mouse") stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && readable() && point(null));
  stage.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || !readable()) return;
    event.preventDefault();
    const { width, height } = page.shown, far = event.shiftKey ? 10 : 1;
    const from = page.cursor ?? { x: width >> 1, y: height >> 1 };
    const inside = (value, size) => Math.min(size - 1, Math.max(0, value));
    point({ x: inside(from.x + far * step[0], width), y: inside(from.y + far * step[1], height) });
  });
  divide(50);
}

connect();
try {
  const answer = await fetch("models");
  if (!answer.ok) throw new Error(await reasonOf(answer));
  offer(await answer.json());
  document.body.dataset.state = "ready";
} catch (error) {
  fail(error);
}
