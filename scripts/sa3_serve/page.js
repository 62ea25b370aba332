"use strict";
const at = (id) => document.getElementById(id);
const fields = ["prompt", "seconds", "seed", "steps"];
let model = null;
let last = null; // the sound that is shown: its bytes, its samples, and what made it
let chosen = null; // [from, to] in seconds
let running = null;
let address = "";

const say = (text) => { at("status").textContent = text; };
const complain = (text) => { at("error").textContent = text; };
const headers = () => (at("token").value ? { authorization: `Bearer ${at("token").value}` } : {});

async function learn() {
  const answer = await fetch("/v1/models", { headers: headers() });
  if (answer.status === 401) {
    at("token-field").hidden = false;
    at("served").textContent = "this server asks for a token";
    return;
  }
  if (!answer.ok) throw new Error(await answer.text());
  model = (await answer.json()).models[0];
  at("token-field").hidden = !model.token;
  at("served").textContent = `${model.id}, ${model.backends.dit}, up to ${model.max_seconds} s`;
  at("precision").replaceChildren(new Option(model.precision, model.precision));
  at("seconds").max = model.max_seconds;
  at("steps").max = model.max_steps;
}

function asked() {
  const found = { prompt: at("prompt").value, seconds: Number(at("seconds").value), steps: Number(at("steps").value) };
  if (at("seed").value !== "") found.seed = Number(at("seed").value);
  return found;
}

// A sound that exists is sent with the request; only the chosen part of it is made anew.
function bodyOf(request, part) {
  if (!part) return [JSON.stringify(request), { "content-type": "application/json" }];
  const form = new FormData();
  for (const [name, value] of Object.entries(request)) form.append(name, String(value));
  form.append("inpaint", part.join(","));
  form.append("init_audio", new Blob([last.bytes], { type: "audio/wav" }), "last.wav");
  return [form, {}];
}

async function make(part) {
  const request = asked();
  if (part) request.seconds = last.about.seconds;
  const [body, kind] = bodyOf(request, part);
  running = new AbortController();
  at("make").disabled = true;
  at("inpaint").disabled = true;
  at("stop").disabled = false;
  complain("");
  say("making it");
  const started = performance.now();
  try {
    if (!model) await learn();
    const answer = await fetch("/v1/audio/generate", { method: "POST", body, headers: { ...headers(), ...kind }, signal: running.signal });
    if (!answer.ok) throw new Error(await answer.text());
    const about = JSON.parse(answer.headers.get("x-sound"));
    show(await answer.arrayBuffer(), { ...about, prompt: request.prompt }, part);
    say(`made in ${((performance.now() - started) / 1000).toFixed(1)} s, seed ${about.seed}`);
  } catch (error) {
    say("");
    if (error.name === "AbortError") say("stopped");
    else complain(error.message);
  } finally {
    running = null;
    at("make").disabled = false;
    at("stop").disabled = true;
    choose(chosen);
  }
}

// 16-bit samples of a WAV, one value a frame: the mean of both channels.
function samplesOf(bytes) {
  const view = new DataView(bytes);
  let place = 12;
  while (view.getUint32(place, false) !== 0x64617461) place += 8 + view.getUint32(place + 4, true) + (view.getUint32(place + 4, true) % 2);
  const pcm = new Int16Array(bytes.slice(place + 8, place + 8 + view.getUint32(place + 4, true)));
  const mono = new Float32Array(pcm.length / 2);
  for (let i = 0; i < mono.length; i += 1) mono[i] = (pcm[2 * i] + pcm[2 * i + 1]) / 65536;
  return mono;
}

function show(bytes, about, part) {
  const from = part ? last.file : null;
  last = { bytes, about, samples: samplesOf(bytes), file: `sa3_${about.seed}.wav`, from, part };
  if (address) URL.revokeObjectURL(address);
  address = URL.createObjectURL(new Blob([bytes], { type: "audio/wav" }));
  at("player").src = address;
  at("download").href = address;
  at("download").download = last.file;
  at("line").value = commandLine();
  at("result").hidden = false;
  choose(null);
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function commandLine() {
  const { about, from, part, file } = last;
  const words = ["sa3_trt", `--prompt=${quoted(about.prompt)}`, `--seconds ${about.seconds}`, `--steps ${about.steps}`, `--seed ${about.seed}`];
  words.push(`--dit ${model.id}`, `--precision ${model.precision}`);
  if (part) words.push(`--init-audio ${quoted(from)}`, `--inpaint-range ${part.join(",")}`);
  words.push(`--out ${quoted(part ? file.replace(".wav", "_inpainted.wav") : file)}`);
  return words.join(" ");
}

function draw() {
  const canvas = at("wave");
  const pen = canvas.getContext("2d");
  const { width, height } = canvas;
  const style = getComputedStyle(document.body);
  pen.clearRect(0, 0, width, height);
  if (chosen) {
    pen.fillStyle = "rgba(42, 111, 219, 0.35)";
    pen.fillRect((chosen[0] / last.about.seconds) * width, 0, ((chosen[1] - chosen[0]) / last.about.seconds) * width, height);
  }
  pen.fillStyle = style.color;
  const each = last.samples.length / width;
  for (let x = 0; x < width; x += 1) {
    let low = 0;
    let high = 0;
    for (let i = Math.floor(x * each); i < Math.floor((x + 1) * each); i += 1) {
      low = Math.min(low, last.samples[i]);
      high = Math.max(high, last.samples[i]);
    }
    pen.fillRect(x, height / 2 - high * (height / 2), 1, Math.max(1, (high - low) * (height / 2)));
  }
}

function choose(part) {
  chosen = part;
  at("inpaint").disabled = !part || running !== null;
  at("clear").disabled = !part;
  if (!last) return;
  const wave = at("wave");
  wave.setAttribute("aria-valuemax", last.about.seconds);
  wave.setAttribute("aria-valuenow", part ? part[0] : 0);
  wave.setAttribute("aria-valuetext", part ? `${part[0]} to ${part[1]} seconds` : "nothing chosen");
  draw();
}

const rounded = (seconds) => Math.round(Math.min(Math.max(seconds, 0), last.about.seconds) * 100) / 100;
const secondsAt = (event) => {
  const box = at("wave").getBoundingClientRect();
  return rounded(((event.clientX - box.left) / box.width) * last.about.seconds);
};

let dragged = null;
at("wave").addEventListener("pointerdown", (event) => {
  dragged = secondsAt(event);
  at("wave").setPointerCapture(event.pointerId);
});
at("wave").addEventListener("pointermove", (event) => {
  if (dragged === null) return;
  const now = secondsAt(event);
  choose(now === dragged ? null : [Math.min(now, dragged), Math.max(now, dragged)]);
});
at("wave").addEventListener("pointerup", () => { dragged = null; });
at("wave").addEventListener("keydown", (event) => {
  const step = last.about.seconds / 40;
  const way = { ArrowLeft: -step, ArrowRight: step, ArrowDown: -step, ArrowUp: step }[event.key];
  if (event.key === "Escape") choose(null);
  else if (way === undefined) return;
  else if (!chosen) choose([0, rounded(4 * step)]);
  else if (event.shiftKey) choose([chosen[0], Math.max(rounded(chosen[0] + step), rounded(chosen[1] + way))]);
  else {
    const length = chosen[1] - chosen[0];
    const start = rounded(Math.min(Math.max(chosen[0] + way, 0), last.about.seconds - length));
    choose([start, rounded(start + length)]);
  }
  event.preventDefault();
});

at("form").addEventListener("submit", (event) => { event.preventDefault(); make(null); });
at("inpaint").addEventListener("click", () => make(chosen));
at("clear").addEventListener("click", () => choose(null));
at("stop").addEventListener("click", () => running && running.abort());
at("token").addEventListener("change", () => learn().catch((error) => complain(error.message)));
learn().catch((error) => complain(error.message));
