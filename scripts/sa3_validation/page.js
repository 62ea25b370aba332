"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const TRIALS = 10, FADE = 0.005; // seconds: shorter clicks, longer blurs the switch
const AHEAD = 0.03; // seconds: the sound thread may be this far past currentTime, and a ramp in the past is a step
const byId = (id) => document.getElementById(id);
let context = null, master = null, playing = null;

function output() {
  if (!context) {
    context = new AudioContext({ sampleRate: data.sampleRate }); // no resampling: what is compared is what was made
    master = context.createGain();
    master.connect(context.destination);
  }
  return context;
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer;
}

/** Both sounds of a case, always running together; only their gains change, so a switch has no gap. */
class Player {
  constructor(sounds) {
    this.sounds = sounds;
    this.chosen = 0;
    this.offset = 0;
    this.running = false;
    this.nodes = [];
    this.onchange = () => {};
  }
  async load() {
    const decoder = output();
    this.loading ||= Promise.all(this.sounds.map((sound) => decoder.decodeAudioData(bytesOf(sound))));
    this.buffers = await this.loading;
  }
  get duration() { return this.buffers ? this.buffers[0].duration : 0; }
  get position() {
    if (!this.running) return this.offset;
    return (this.offset + Math.max(0, context.currentTime - this.startedAt)) % this.duration;
  }
  async play() {
    if (playing && playing !== this) playing.pause();
    playing = this;
    await this.load();
    await context.resume();
    if (playing !== this || this.running) return;
    this.startedAt = context.currentTime + AHEAD;
    this.settled = this.startedAt;
    this.nodes = this.buffers.map((buffer, index) => {
      const source = context.createBufferSource(), gain = context.createGain();
      source.buffer = buffer;
      source.loop = true;
      gain.gain.value = index === this.chosen ? 1 : 0;
      source.connect(gain).connect(master);
      source.start(this.startedAt, this.offset);
      return { source, gain };
    });
    this.running = true;
    this.onchange();
  }
  pause() {
    if (playing === this) playing = null;
    if (!this.running) return;
    this.offset = this.position;
    this.running = false;
    for (const { source, gain } of this.nodes) { source.stop(); gain.disconnect(); }
    this.onchange();
  }
  toggle() { return this.running ? this.pause() : this.play(); }
  async seek(share) {
    await this.load();
    const again = this.running;
    this.pause();
    this.offset = Math.min(share, 0.9999) * this.duration;
    if (again) await this.play();
    this.onchange();
  }
  choose(index) {
    const before = this.chosen;
    this.chosen = index;
    if (this.running) {
      const begin = Math.max(context.currentTime + AHEAD, this.settled); // one after the other: ramps never cross
      this.settled = begin + FADE;
      this.nodes.forEach(({ gain }, number) => {
        gain.gain.setValueAtTime(number === before ? 1 : 0, begin);
        gain.gain.linearRampToValueAtTime(number === index ? 1 : 0, begin + FADE);
      });
    }
    this.onchange();
  }
}

function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value); else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const clock = (seconds) => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;

function card(one) {
  const player = new Player(one.sounds);
  const play = element("button", { type: "button", "aria-label": `Play ${one.name}`, onclick: () => player.toggle() }, "Play");
  const position = element("input", { type: "range", min: 0, max: 1, step: 0.001, value: 0,
    "aria-label": `Position of ${one.name}`, oninput: (event) => player.seek(Number(event.target.value)) });
  const time = element("span", { class: "note" }, "0:00.0");
  const choices = data.names.map((name, index) => element("button", { type: "button", "aria-pressed": index === 0,
    "aria-label": `${one.name}: ${name}`, onclick: () => player.choose(index) }, `${"AB"[index]}: ${name}`));
  const heads = [];
  const pictures = one.pictures.map((picture, index) => {
    heads.push(element("div", { class: "head" }));
    const image = element("img", { src: `data:image/png;base64,${picture}`, alt: `Spectrogram of ${one.name}, ${data.names[index]}` });
    return element("figure", {}, element("div", { class: "picture" }, image, heads[index]), element("figcaption", {}, data.names[index]));
  });
  const rows = one.metrics.map(([name, ...cells]) =>
    element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", {}, cell))));
  const head = element("tr", {}, ...data.columns.map((name) => element("th", { scope: "col" }, name)));
  const show = () => {
    const share = player.duration ? player.position / player.duration : 0;
    position.value = share;
    time.textContent = clock(player.position);
    for (const line of heads) line.style.left = `${100 * share}%`;
  };
  player.onchange = () => {
    play.textContent = player.running ? "Pause" : "Play";
    play.setAttribute("aria-label", `${player.running ? "Pause" : "Play"} ${one.name}`);
    choices.forEach((choice, index) => choice.setAttribute("aria-pressed", index === player.chosen));
    show();
  };
  byId("cards").append(element("article", { class: "card", "aria-label": one.name },
    element("h2", {}, one.name), element("p", { class: "prompt" }, one.prompt),
    element("div", { class: "row", role: "group", "aria-label": `Which DiT, ${one.name}` }, play, ...choices),
    element("div", { class: "row" }, position, time), element("div", { class: "pictures" }, ...pictures),
    element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Figures of ${one.name}` },
      element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)))));
  return { player, show };
}

/** A small generator whose numbers depend on the seed alone (mulberry32). */
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** The chance to score this or better by guessing. */
function guessing(right, trials) {
  let sum = 0, ways = 1;
  for (let hits = 0; hits <= trials; hits++) {
    if (hits >= right) sum += ways;
    ways = ways * (trials - hits) / (hits + 1);
  }
  return sum / 2 ** trials;
}

const blind = { trials: [], at: 0, player: null, heard: "A" };

function start(seed) {
  const next = generator(seed);
  let order = [];
  blind.seed = seed;
  blind.at = 0;
  blind.trials = Array.from({ length: TRIALS }, () => {
    if (!order.length) order = data.cases.map((_, index) => [next(), index]).sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);
    return { case: order.pop(), x: next() < 0.5 ? "A" : "B", said: null };
  });
  byId("result").hidden = true;
  byId("trial").hidden = false;
  trial();
}

function trial() {
  const now = blind.trials[blind.at], one = data.cases[now.case];
  if (blind.player) blind.player.pause();
  blind.player = new Player(one.sounds);
  blind.player.onchange = () => { byId("blind-play").textContent = blind.player.running ? "Pause" : "Play"; };
  byId("blind-play").textContent = "Play";
  byId("count").textContent = `Trial ${blind.at + 1} of ${TRIALS}: ${one.name}`;
  byId("blind-prompt").textContent = one.prompt;
  hear("A", false);
}

function hear(which, sound = true) {
  blind.heard = which;
  blind.player.choose("AB".indexOf(which === "X" ? blind.trials[blind.at].x : which));
  for (const choice of byId("blind-choices").children) choice.setAttribute("aria-pressed", choice.dataset.which === which);
  if (sound && !blind.player.running) blind.player.play();
}

function answer(said) {
  if (byId("trial").hidden) return;
  blind.trials[blind.at].said = said;
  blind.at += 1;
  if (blind.at < TRIALS) return trial();
  blind.player.pause();
  byId("trial").hidden = true;
  byId("result").hidden = false;
  const { right, p } = outcome();
  byId("score").textContent = `${right} of ${TRIALS} right, p = ${p.toFixed(4)}: guessing alone scores this or better in ${(100 * p).toFixed(1)} % of tests.`;
  byId("answers").replaceChildren(...blind.trials.map((one, index) => element("tr", {},
    ...[index + 1, data.cases[one.case].name, one.x, one.said].map((cell) => element("td", {}, String(cell))))));
}

function outcome() {
  const right = blind.trials.filter((one) => one.said === one.x).length;
  return { right, p: guessing(right, TRIALS) };
}

function result() {
  const { right, p } = outcome();
  const trials = blind.trials.map((one) => ({ case: data.cases[one.case].name, x: one.x, said: one.said, right: one.x === one.said }));
  return { format: 1, kind: "sa3_trt blind test", A: data.names[0], B: data.names[1], report: data.created,
    finished: new Date().toISOString(), seed: blind.seed, trials, right, of: TRIALS, p };
}

function save() {
  const url = URL.createObjectURL(new Blob([JSON.stringify(result(), null, 1)], { type: "application/json" }));
  element("a", { href: url, download: `blind-test-${blind.seed}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function view(name) {
  if (playing) playing.pause();
  for (const one of ["listen", "blind"]) {
    byId(one).hidden = one !== name;
    byId(`show-${one}`).setAttribute("aria-pressed", one === name);
  }
}

function key(event) {
  const typing = event.target.matches("input:not([type=range])");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const letter = event.key.toUpperCase(), testing = !byId("trial").hidden && !byId("blind").hidden;
  const listening = !byId("listen").hidden;
  if (event.key === " " && !event.target.matches("button")) {
    event.preventDefault();
    (testing ? blind.player : listening ? playing || last : null)?.toggle();
  } else if (testing && "ABX".includes(letter)) hear(letter);
  else if (testing && "12".includes(event.key)) answer("AB"[event.key - 1]);
  else if (listening && "AB".includes(letter)) (playing || last).choose("AB".indexOf(letter));
}

byId("verdict").textContent = data.verdict;
if (data.twoSample) {
  const { title, header, rows, words } = data.twoSample, section = byId("two-sample");
  section.hidden = false;
  section.append(element("h2", {}, title), ...words.map((line) => element("p", {}, line)),
    element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Figures of the two-sample test" },
      element("table", {},
        element("thead", {}, element("tr", {}, ...header.map((name) => element("th", { scope: "col" }, name)))),
        element("tbody", {}, ...rows.map(([name, ...cells]) => element("tr", {},
          element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", {}, cell))))))));
}
const cards = data.cases.map(card);
let last = cards[0].player;
for (const { player } of cards) {
  const shown = player.onchange;
  player.onchange = () => { if (player.running) last = player; shown(); };
}
byId("blind-choices").append(...["A", "B", "X"].map((which) => element("button", { type: "button", "data-which": which,
  "aria-pressed": which === "A", onclick: () => hear(which) }, which === "X" ? "X" : `${which}: ${data.names["AB".indexOf(which)]}`)));
byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1e9;
byId("setup").addEventListener("submit", (event) => { event.preventDefault(); start(Number(byId("seed").value)); });
byId("show-listen").addEventListener("click", () => view("listen"));
byId("show-blind").addEventListener("click", () => view("blind"));
byId("blind-play").addEventListener("click", () => blind.player.toggle());
byId("blind-position").addEventListener("input", (event) => blind.player.seek(Number(event.target.value)));
byId("is-a").addEventListener("click", () => answer("A"));
byId("is-b").addEventListener("click", () => answer("B"));
byId("export").addEventListener("click", save);
document.addEventListener("keydown", key);
setInterval(() => {
  for (const { player, show } of cards) if (player.running) show();
  if (blind.player?.running) byId("blind-position").value = blind.player.position / blind.player.duration;
}, 100);
