"use strict";
// Every text reaches the page through textContent: nothing in this file parses markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  // ---- tables: sorting and filtering
  const tables = [...document.querySelectorAll("table.runs")];
  const sortValue = (body, column) => {
    const cell = body.rows[0].cells[column];
    if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
    return cell.classList.contains("none") ? null : cell.textContent.trim().toLowerCase();
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  for (const table of tables) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      // An arm is a body of its own: its row and its details.
      const keyed = [...table.tBodies].map((body) => [sortValue(body, column), body]);
      // Unknown values stay last in both directions.
      keyed.sort(([a], [b]) => (a === null) - (b === null) || (a === null ? 0 : sign * compare(a, b)));
      table.append(...keyed.map(([, body]) => body));
    }));
  }
  byId("filter")?.addEventListener("input", (event) => {
    const wanted = event.target.value.toLowerCase();
    let shown = 0, all = 0;
    for (const body of document.querySelectorAll("tbody.arm")) {
      body.hidden = !body.dataset.text.toLowerCase().includes(wanted);
      shown += !body.hidden;
      all += 1;
    }
    byId("filtered").textContent = wanted ? `${shown} of ${all} rows` : "";
  });

  // ---- samples
  const runs = JSON.parse(byId("runs-data").textContent);
  const kinds = new Map(JSON.parse(byId("attack-names").textContent));
  const attacks = [...kinds.keys()];
  if (!attacks.length) return;
  const [runA, runB, attackBox, mode, search] = ["run-a", "run-b", "attack", "mode", "search"].map(byId);
  const list = byId("list"), detail = byId("detail"), found = byId("found");
  const opened = new Map();
  let shown = [], current = -1, turn = 0;

  // A pack is unfolded when its attack is first looked at, and kept.
  const open = (attack) => {
    if (!opened.has(attack)) opened.set(attack, unfold(byId(`pack${attacks.indexOf(attack)}`).textContent));
    return opened.get(attack);
  };
  const unfold = async (text) => {
    const binary = atob(text), bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"))).json();
  };
  const samplesOf = (pack, number) => {
    const run = pack.runs[number], samples = new Map();
    if (run) run.record.forEach((record, i) => samples.set(record, {
      hit: run.hit[i] === "1", text: pack.strings[run.response[i]], template: pack.strings[run.template[i]],
    }));
    return samples;
  };
  const option = (box, value, text) => {
    const node = make("option", text);
    node.value = value;
    box.append(node);
  };
  runs.forEach((run, number) => [runA, runB].forEach((box) => option(box, number, `${run.label} (${run.title})`)));
  attacks.forEach((attack) => option(attackBox, attack, attack));
  runB.value = String(Math.min(1, runs.length - 1));

  const outcome = (hit) => {
    const [yes, no] = { benign: ["✗ refused", "✓ answered"], control: ["✓ followed", "✗ not followed"] }[kinds.get(attackBox.value)]
      ?? ["✗ hacked", "✓ not hacked"];
    return hit ? yes : no;
  };
  const hashOf = (record) => "#" + ["sample", attackBox.value, record, runs[runA.value].label, runs[runB.value].label]
    .map(encodeURIComponent).join("/");

  const refresh = async (wantedRecord) => {
    const mine = ++turn, attack = attackBox.value;
    if (!opened.has(attack)) found.textContent = "Unpacking …";
    let pack;
    try {
      pack = await open(attack);
    } catch (error) {
      found.textContent = `The samples of ${attack} can't be unpacked: ${error.message}`;
      return;
    }
    if (mine !== turn) return;
    const a = samplesOf(pack, runA.value), b = samplesOf(pack, runB.value), wanted = search.value.toLowerCase();
    const common = [...a.keys()].filter((record) => b.has(record));
    shown = common.map((record) => {
      const [id, instruction, before, injected, behind] = pack.records[record];
      return { id, instruction: pack.strings[instruction], before: pack.strings[before], injected: pack.strings[injected],
        behind: pack.strings[behind], a: a.get(record), b: b.get(record) };
    }).filter((s) => mode.value === "all" || (mode.value === "flips" ? s.a.hit !== s.b.hit : s.a.text !== s.b.text))
      .filter((s) => !wanted || String(s.id) === wanted
        || [s.instruction, s.before + s.injected + s.behind, s.a.text, s.b.text].some((text) => text.toLowerCase().includes(wanted)));
    found.textContent = common.length ? `${shown.length} of ${common.length} records` : "These two runs share no records of this attack.";
    const items = make("ol");
    shown.forEach((sample) => {
      const item = make("li"), link = make("a", `Record ${sample.id}`);
      link.href = hashOf(sample.id);
      link.append(make("small", `A ${outcome(sample.a.hit)}, B ${outcome(sample.b.hit)}`, "block"));
      item.append(link);
      items.append(item);
    });
    list.replaceChildren(items);
    const place = shown.findIndex((sample) => String(sample.id) === wantedRecord);
    show(place >= 0 ? place : 0);
  };

  const dataParts = (sample) => [document.createTextNode(sample.before),
    ...(sample.injected ? [make("mark", sample.injected)] : []), document.createTextNode(sample.behind)];
  // The prompt as sent: the template's marks are put back, the injection in them is marked.
  const promptParts = (sample, template) => template.split(/([\u0001\u0002])/).flatMap((part) => {
    const blank = /^[ \t\r\n]+|[ \t\r\n]+$/g, first = /^[ \t\r\n]+/, last = /[ \t\r\n]+$/;
    if (part === "\u0002") return [document.createTextNode(sample.instruction.replace(blank, ""))];
    if (part !== "\u0001") return [document.createTextNode(part)];
    let { before, injected, behind } = sample;
    // What stands first and last was trimmed as the template was made.
    before = before.replace(first, "");
    if (!before) injected = injected.replace(first, "");
    behind = behind.replace(last, "");
    if (!behind) injected = injected.replace(last, "");
    if (!injected && !behind) before = before.replace(last, "");
    if (!before && !injected) behind = behind.replace(first, "");
    return dataParts({ before, injected, behind });
  });
  const block = (nodes) => {
    const node = make("pre");
    node.dir = "auto";
    node.append(...nodes);
    return node;
  };
  const side = (name, run, sample, own) => {
    const node = make("section"), prompt = make("details");
    prompt.append(make("summary", "Prompt as sent"), block(promptParts(sample, own.template)));
    const head = make("h3", `${name}: `);
    head.append(make("bdi", run.label));
    node.append(head, make("span", outcome(own.hit), "tag"), make("h4", "Response"),
      block([document.createTextNode(own.text || "(empty)")]), prompt);
    return node;
  };
  const show = (place) => {
    const links = [...list.querySelectorAll("a")];
    links[current]?.removeAttribute("aria-current");
    current = shown.length ? Math.max(0, Math.min(place, shown.length - 1)) : -1;
    if (current < 0) return detail.replaceChildren(make("p", "No record fits. Choose other runs, another attack or “all records”."));
    const sample = shown[current], sides = make("div", undefined, "sides"), asked = make("section");
    for (const link of links) link.removeAttribute("aria-current");
    links[current].setAttribute("aria-current", "true");
    // Not scrollIntoView: that would move the page as well.
    const { offsetTop, offsetHeight } = links[current], top = offsetTop - list.offsetTop;
    if (top < list.scrollTop || top + offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2;
    asked.append(make("h3", `Record ${sample.id}`), make("h4", "Instruction (trusted)"), block([document.createTextNode(sample.instruction)]),
      make("h4", sample.injected ? "Data (untrusted; the injection is marked)" : "Data (untrusted; nothing injected)"), block(dataParts(sample)));
    sides.append(asked, side("A", runs[runA.value], sample, sample.a), side("B", runs[runB.value], sample, sample.b));
    detail.replaceChildren(sides);
  };
  const move = (step) => {
    if (current < 0) return;
    show(current + step);
    history.replaceState(null, "", hashOf(shown[current].id));
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const inBrowser = list.contains(event.target) || detail.contains(event.target);
    const step = { j: 1, k: -1, ...(inBrowser ? { ArrowDown: 1, ArrowUp: -1 } : {}) }[event.key];
    if (step) move(step);
    else if (event.key === "/") search.focus();
    else return;
    event.preventDefault();
  });
  for (const box of [runA, runB, attackBox, mode]) box.addEventListener("change", () => refresh());
  search.addEventListener("input", () => refresh());

  // #sample/ATTACK/RECORD/RUN A/RUN B
  const follow = () => {
    let parts;
    try {
      parts = location.hash.slice(1).split("/").map(decodeURIComponent);
    } catch {
      return false;
    }
    const [kind, attack, record, labelA, labelB] = parts;
    const a = runs.findIndex((run) => run.label === labelA), b = runs.findIndex((run) => run.label === labelB);
    if (kind !== "sample" || !attacks.includes(attack) || a < 0 || b < 0) return false;
    const here = attackBox.value === attack && runA.value === String(a) && runB.value === String(b);
    const place = here ? shown.findIndex((sample) => String(sample.id) === record) : -1;
    if (place >= 0) {
      show(place);
      return true;
    }
    [attackBox.value, runA.value, runB.value, mode.value, search.value] = [attack, String(a), String(b), "all", ""];
    refresh(record);
    byId("samples").scrollIntoView();
    return true;
  };
  window.addEventListener("hashchange", follow);
  if (!follow()) {
    // Unpacking waits until the browser comes into view.
    const watcher = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      watcher.disconnect();
      if (!turn) refresh();
    });
    watcher.observe(byId("samples"));
  }
})();
