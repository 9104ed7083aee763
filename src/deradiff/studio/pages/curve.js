// The curve editor. It moves points and draws what the server's schedules make of them; it interpolates nothing itself.
const SVG = 'http://www.w3.org/2000/svg';
const LEFT = 46, RIGHT = 594, TOP = 16, BOTTOM = 284;
const NUDGE = 0.01, LARGE_NUDGE = 0.05;
const find = (name) => element.querySelector(name);
const plot = find('.plot'), readout = find('.readout');
const closest = props.closest, most = props.most_points;

let shown = null;        // what the server made of the present curve
let points = [];         // as they are being moved
let chosen = -1;         // the index of the point that has the focus
let state = null;        // what is asked of the server: points, or a schedule from elsewhere
let past = [], future = [];
let waiting = null, asking = false, dragging = null, pressed = [-1, -1];

const x = (s) => LEFT + s * (RIGHT - LEFT);
const y = (lam) => BOTTOM - lam * (BOTTOM - TOP);
const clamp = (value, least, greatest) => Math.min(Math.max(value, least), greatest);
const rounded = (value) => Math.round(value * 1000) / 1000;

function make(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

function frame() {
  const group = find('.frame');
  group.replaceChildren();
  for (let i = 0; i <= 4; i++) {
    const at = i / 4;
    make(group, 'line', {x1: x(0), x2: x(1), y1: y(at), y2: y(at), class: 'grid'});
    make(group, 'line', {y1: y(0), y2: y(1), x1: x(at), x2: x(at), class: 'grid'});
    make(group, 'text', {x: LEFT - 8, y: y(at) + 4, class: 'tick end'}, at.toString());
    make(group, 'text', {x: x(at), y: BOTTOM + 18, class: 'tick middle'}, Math.round(at * 100) + '%');
  }
  make(group, 'text', {x: x(0), y: BOTTOM + 38, class: 'tick'}, 'pure noise, t = T');
  make(group, 'text', {x: x(0.5), y: BOTTOM + 38, class: 'tick middle'}, 'of the run done');
  make(group, 'text', {x: x(1), y: BOTTOM + 38, class: 'tick end'}, 'image, t = 0');
}

const path = (line, value) => line.map(([s, lam], i) => `${i ? 'L' : 'M'}${x(s).toFixed(1)} ${y(value(lam)).toFixed(1)}`).join('');

function describe(i) {
  const [s, lam] = points[i];
  return `at ${(100 * s).toFixed(1)} percent of the run, λ ${lam.toFixed(3)}`;
}

function drawPoints() {
  const group = find('.points');
  const focused = group.contains(document.activeElement);
  if (group.childElementCount !== points.length) {
    group.replaceChildren();
    points.forEach((_, i) => {
      const pinned = i === 0 || i === points.length - 1;
      const mark = make(group, 'g', {class: pinned ? 'point pinned' : 'point', 'data-index': i});
      make(mark, 'circle', {r: 18, class: 'target'});
      if (pinned) make(mark, 'rect', {x: -6, y: -6, width: 12, height: 12, class: 'mark'});
      else {
        make(mark, 'circle', {r: 8, class: 'mark'});
        for (const [key, value] of Object.entries({tabindex: 0, role: 'slider', 'aria-orientation': 'vertical'})) mark.setAttribute(key, value);
        mark.addEventListener('focus', () => { chosen = i; tools(); });
      }
    });
  }
  points.forEach(([s, lam], i) => {
    const mark = group.children[i];
    mark.setAttribute('transform', `translate(${x(s)} ${y(lam)})`);
    if (!mark.classList.contains('pinned')) {
      mark.setAttribute('aria-label', `Point ${i} of ${points.length - 2}`);
      mark.setAttribute('aria-valuemin', points[i - 1][1]);
      mark.setAttribute('aria-valuemax', points[i + 1][1]);
      mark.setAttribute('aria-valuenow', lam);
      mark.setAttribute('aria-valuetext', describe(i));
    }
  });
  // Whoever moves by keyboard is not sent back to the top of the page when points come or go.
  if (focused && !group.contains(document.activeElement)) {
    if (points.length > 2) focus(clamp(chosen, 1, points.length - 2)); else find('[data-do=add]').focus();
  }
}

function tools() {
  const enabled = {
    add: points.length < most,
    remove: chosen > 0 && chosen < points.length - 1,
    undo: past.length > 0,
    redo: future.length > 0,
  };
  for (const [name, on] of Object.entries(enabled)) find(`[data-do=${name}]`).setAttribute('aria-disabled', String(!on));
}

function render() {
  find('.lam').setAttribute('d', path(shown.line, (lam) => lam));
  find('.gamma').setAttribute('d', path(shown.line, (lam) => 1 - lam));
  const dots = find('.steps');
  dots.replaceChildren();
  for (const [s, lam] of shown.steps) make(dots, 'circle', {cx: x(s), cy: y(lam), r: 2.2});
  const average = `average λ over ${shown.steps.length} steps: ${shown.average.toFixed(3)} of the dial's`;
  readout.textContent = shown.schedule ? `${shown.description} · ${average}` : shown.description;
  find('.list').textContent = shown.steps.map(([, lam], i) => `${i + 1}: ${lam.toFixed(3)}`).join('   ');
  drawPoints();
  tools();
}

// One question at a time; of those that come meanwhile only the last is asked.
async function ask(request, then) {
  waiting = {request, then};
  if (asking) return;
  asking = true;
  try {
    while (waiting) {
      const now = waiting;
      waiting = null;
      const answer = await server.answer({...now.request, steps: (props.value || {}).steps});
      if (answer.error) {  // back to what is in force
        readout.textContent = answer.error;
        if (!waiting && shown) { points = shown.points; state = {schedule: shown.schedule}; drawPoints(); }
        continue;
      }
      shown = answer;
      if (!waiting) {
        if (!dragging) points = shown.points;
        now.then();
      }
    }
  } catch (error) {
    readout.textContent = 'The studio does not answer. Is it still running?';
  } finally { asking = false; }
}

function publish() {
  render();
  props.value = {schedule: shown.schedule, steps: shown.steps.length};
  trigger('input');
}

function remember() {
  past.push(state);
  if (past.length > 200) past.shift();
  future = [];
}

function send() {
  state = {points: [...points], over: shown.schedule ? shown.schedule.over : 'steps'};
  ask(state, publish);
}

function move(i, s, lam) {
  points[i] = [
    rounded(clamp(s, points[i - 1][0] + closest, points[i + 1][0] - closest)),
    rounded(clamp(lam, points[i - 1][1], points[i + 1][1])),
  ];
}

function add(s, lam) {
  if (points.length >= most) { readout.textContent = `A curve has ${most} points at most.`; return -1; }
  const base = points.length ? points : [[0, 0], [1, 1]];
  const i = base.findIndex(([other]) => other > s);
  if (i < 1 || s - base[i - 1][0] < closest || base[i][0] - s < closest) return -1;
  remember();
  points = [...base.slice(0, i), [rounded(s), rounded(clamp(lam, base[i - 1][1], base[i][1]))], ...base.slice(i)];
  return i;
}

function addAfter(i) {
  const base = points.length ? points : [[0, 0], [1, 1]];
  if (i < 0 || i >= base.length - 1) {  // the widest gap
    i = 0;
    for (let k = 1; k < base.length - 1; k++) if (base[k + 1][0] - base[k][0] > base[i + 1][0] - base[i][0]) i = k;
  }
  const s = (base[i][0] + base[i + 1][0]) / 2;
  const line = points.length ? shown.line : base;  // from no curve, the straight line
  const after = line.findIndex(([other]) => other >= s), [s0, lam0] = line[after - 1], [s1, lam1] = line[after];
  const at = add(s, lam0 + (lam1 - lam0) * (s - s0) / (s1 - s0));
  if (at > 0) { drawPoints(); focus(at); send(); }
}

function remove(i) {
  if (i < 1 || i >= points.length - 1) return;
  remember();
  points = points.filter((_, k) => k !== i);
  chosen = Math.min(i, points.length - 2);
  drawPoints();
  send();
}

function focus(i) { chosen = i; find('.points').children[i].focus(); }

function travel(from, to) {
  if (!from.length) return;
  to.push(state);
  state = from.pop();
  ask(state, publish);
}
const undo = () => travel(past, future), redo = () => travel(future, past);

function place(event) {
  const matrix = plot.getScreenCTM().inverse();
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
  return [(at.x - LEFT) / (RIGHT - LEFT), (BOTTOM - at.y) / (BOTTOM - TOP)];
}

plot.addEventListener('pointerdown', (event) => {
  if (event.button !== 0) return;
  const mark = event.target.closest('.point');
  let i = mark ? Number(mark.dataset.index) : -1;
  pressed = [pressed[1], i];
  if (mark && mark.classList.contains('pinned')) return;
  event.preventDefault();
  if (i < 0) {
    const [s, lam] = place(event);
    if (s <= 0 || s >= 1 || lam < -0.05 || lam > 1.05) return;
    i = add(s, lam);
    if (i < 0) return;
    drawPoints();
    dragging = {i, moved: true};
    send();
  } else dragging = {i, moved: false};
  focus(i);
  plot.setPointerCapture(event.pointerId);
});
plot.addEventListener('pointermove', (event) => {
  if (!dragging) return;
  if (!dragging.moved) { remember(); dragging.moved = true; }
  move(dragging.i, ...place(event));
  drawPoints();
  send();
});
for (const name of ['pointerup', 'pointercancel']) plot.addEventListener(name, () => {
  if (!dragging) return;
  const moved = dragging.moved;
  dragging = null;
  if (moved) send();
});
// A captured pointer's events go to the plot: which point was pressed twice, the presses tell.
plot.addEventListener('dblclick', () => { if (pressed[0] === pressed[1]) remove(pressed[1]); });

element.addEventListener('keydown', (event) => {
  const control = event.ctrlKey || event.metaKey, key = event.key.toLowerCase();
  if (control && key === 'z') { event.preventDefault(); (event.shiftKey ? redo : undo)(); return; }
  if (control && key === 'y') { event.preventDefault(); redo(); return; }
  const mark = event.target.closest('.point');
  if (!mark || control || event.altKey) return;
  const i = Number(mark.dataset.index), by = event.shiftKey ? LARGE_NUDGE : NUDGE;
  const steps = {ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, by], ArrowDown: [0, -by]};
  if (event.key in steps) {
    event.preventDefault();
    const before = String(points[i]), [ds, dlam] = steps[event.key];
    remember();
    move(i, points[i][0] + ds, points[i][1] + dlam);
    if (String(points[i]) === before) { past.pop(); return; }
    drawPoints();
    send();
  } else if (event.key === 'Delete' || event.key === 'Backspace') { event.preventDefault(); remove(i); }
  else if (event.key === 'Enter' || event.key === '+') { event.preventDefault(); addAfter(i); }
});

find('.tools').addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button || button.getAttribute('aria-disabled') === 'true') return;
  const actions = {add: () => addAfter(chosen), remove: () => remove(chosen), undo, redo};
  actions[button.dataset.do]();
});

// A curve that came from elsewhere in the page: a family, a kept curve, a preset.
function arrive() {
  const schedule = props.value ? props.value.schedule : null;
  if (shown && JSON.stringify(schedule) !== JSON.stringify(shown.schedule)) remember();
  state = {schedule};
  ask(state, render);
}
watch('value', arrive);

frame();
arrive();
