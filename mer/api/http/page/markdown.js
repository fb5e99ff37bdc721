// Markdown to elements. Nothing is ever parsed as HTML: what a model writes can only become text inside of elements
// that are made here, and links to http, https and mailto.

const DEEPEST = 10;
const LABEL = 1000;  // characters in which the end of a link's text is looked for

export function render(text) {
  const made = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), made, 0);
  return made;
}

function element(name, parent, attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

const fence = line => /^ {0,3}(`{3,}|~{3,})([^`]*)$/.exec(line);
const heading = line => /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/.exec(line);
const rule = line => /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/.test(line);
const quote = line => /^ {0,3}> ?(.*)$/.exec(line);
const item = line => /^( *)([-+*]|\d{1,9}[.)])(?: +(.*)|)$/.exec(line);
const blank = line => line.trim() === "";

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map(cell => cell.trim());
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-")
    && cells(lines[at + 1]).every(cell => /^:?-+:?$/.test(cell))
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

const begins = (lines, at) =>
  fence(lines[at]) || heading(lines[at]) || rule(lines[at]) || quote(lines[at]) || item(lines[at]) || isTable(lines, at);

// tight: paragraphs stand there without an element of their own, as in a list whose items stand close together.
function blocks(lines, parent, depth, tight = false) {
  let at = 0;
  while (at < lines.length) {
    let found;
    if (blank(lines[at])) {
      at++;
    } else if ((found = fence(lines[at]))) {
      at = code(lines, at, found, parent);
    } else if ((found = heading(lines[at]))) {
      const text = (found[2] ?? "").trim().replace(/ +#+$/, "");
      inline(text, element(`h${Math.min(found[1].length + 2, 6)}`, parent), 0);
      at++;
    } else if (rule(lines[at])) {
      element("hr", parent);
      at++;
    } else if (depth < DEEPEST && quote(lines[at])) {
      const inside = [];
      while (at < lines.length && (found = quote(lines[at]))) {
        inside.push(found[1]);
        at++;
      }
      blocks(inside, element("blockquote", parent), depth + 1);
    } else if (depth < DEEPEST && item(lines[at])) {
      at = list(lines, at, parent, depth);
    } else if (isTable(lines, at)) {
      at = table(lines, at, parent);
    } else {
      const first = at++;
      while (at < lines.length && !blank(lines[at]) && !begins(lines, at)) at++;
      const text = lines.slice(first, at).map(line => line.trimStart()).join("\n");
      inline(text, tight ? parent : element("p", parent), 0);
    }
  }
}

function code(lines, at, [, mark, language], parent) {
  const inside = [];
  for (at++; at < lines.length; at++) {
    const line = lines[at].trim();
    if (line.startsWith(mark) && line === mark[0].repeat(line.length)) break;
    inside.push(lines[at]);
  }
  const pre = element("pre", parent, { tabindex: "0" });
  if (language.trim()) pre.dataset.language = language.trim().split(/\s/)[0];
  element("code", pre).textContent = inside.join("\n");
  return at + 1;
}

function list(lines, at, parent, depth) {
  const [, indent, mark] = item(lines[at]);
  const numbered = /\d/.test(mark);
  const made = element(numbered ? "ol" : "ul", parent);
  if (numbered && parseInt(mark, 10) !== 1) made.setAttribute("start", parseInt(mark, 10));
  const items = [];
  let found, loose = false;
  while (at < lines.length && (found = item(lines[at])) && found[1].length === indent.length
         && /\d/.test(found[2]) === numbered) {
    const deeper = indent.length + 2;
    const inside = [found[3] ?? ""];
    for (at++; at < lines.length; at++) {
      const line = lines[at];
      if (blank(line)) {
        const next = lines[at + 1];
        if (next === undefined || blank(next) || next.search(/\S/) < deeper) break;
        inside.push("");
        loose = true;
      } else if (line.search(/\S/) >= deeper) {
        inside.push(line.slice(Math.min(line.search(/\S/), indent.length + found[2].length + 1)));
      } else if (begins(lines, at)) {
        break;
      } else {
        inside.push(line);
      }
    }
    items.push(inside);
    if (at + 1 < lines.length && blank(lines[at]) && item(lines[at + 1])?.[1].length === indent.length) {
      loose = true;
      at++;
    }
  }
  for (const inside of items) blocks(inside, element("li", made), depth + 1, !loose);
  return at;
}

function table(lines, at, parent) {
  const made = element("table", parent);
  const columns = cells(lines[at]).length;
  const row = (line, kind, place) => {
    const given = cells(line);
    const line_ = element("tr", place);
    for (let i = 0; i < columns; i++) inline(given[i] ?? "", element(kind, line_), 0);
  };
  row(lines[at], "th", element("thead", made));
  const body = element("tbody", made);
  for (at += 2; at < lines.length && lines[at].includes("|"); at++) row(lines[at], "td", body);
  return at;
}

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const letter = char => char !== undefined && /[\p{L}\p{N}]/u.test(char);

function inline(text, parent, depth) {
  let plain = "", at = 0;
  const hopeless = new Set();  // marks that are not closed from here on
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  while (at < text.length) {
    const char = text[at];
    if (char === "\\" && at + 1 < text.length && /[!-/:-@[-`{-~]/.test(text[at + 1])) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (char === "\n") {
      flush();
      element("br", parent);
      at++;
      continue;
    }
    const end = depth < DEEPEST ? span(text, at, parent, depth, hopeless, flush) : 0;
    if (end) {
      at = end;
    } else {
      // A run of backticks or marks that means nothing stands for itself as a whole.
      const run = char === "`" || char === "*" || char === "_" || char === "~" ? runOf(text, at) : 1;
      plain += text.slice(at, at + run);
      at += run;
    }
  }
  flush();
}

function runOf(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end++;
  return end - at;
}

// What begins here, made an element: where it ends; 0: nothing does.
function span(text, at, parent, depth, hopeless, flush) {
  const char = text[at];
  if (char === "`") {
    const length = runOf(text, at);
    if (hopeless.has(length)) return 0;
    const end = closing(text, at + length, length);
    if (end < 0) {
      hopeless.add(length);
      return 0;
    }
    flush();
    const inside = text.slice(at + length, end).replace(/\n/g, " ");
    element("code", parent).textContent = /^ .*[^ ].* $/.test(inside) ? inside.slice(1, -1) : inside;
    return end + length;
  }
  if (char === "[" || (char === "!" && text[at + 1] === "[")) return link(text, at, parent, depth, flush);
  if (char === "h" && !letter(text[at - 1])) {
    const found = /^https?:\/\/[^\s<>"'`)\]]+/.exec(text.slice(at, at + 2000));
    if (!found) return 0;
    const url = found[0].replace(/[.,;:!?*_~]+$/, "");
    flush();
    anchor(url, parent).append(url);
    return at + url.length;
  }
  for (const [mark, name] of MARKS) {
    if (!text.startsWith(mark, at) || hopeless.has(mark)) continue;
    const word = mark[0] === "_";
    const first = text[at + mark.length];
    if (first === undefined || /\s/.test(first) || (word && letter(text[at - 1]))) continue;
    let end = at + mark.length;
    do {
      end = text.indexOf(mark, end + 1);
    } while (end > 0 && (/\s/.test(text[end - 1]) || (word && letter(text[end + mark.length]))
                         || (mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark))));
    if (end < 0) {
      hopeless.add(mark);
      continue;
    }
    flush();
    inline(text.slice(at + mark.length, end), element(name, parent), depth + 1);
    return end + mark.length;
  }
  return 0;
}

function closing(text, from, length) {
  for (let at = text.indexOf("`", from); at >= 0; at = text.indexOf("`", at)) {
    const run = runOf(text, at);
    if (run === length) return at;
    at += run;
  }
  return -1;
}

function link(text, at, parent, depth, flush) {
  const open = text[at] === "!" ? at + 1 : at;
  let end = open, nested = 0;
  for (; end < text.length && end < open + LABEL; end++) {
    if (text[end] === "[") nested++;
    else if (text[end] === "]" && --nested === 0) break;
  }
  if (nested || text[end] !== "]") return 0;
  const found = /^\(([^\s()]*(?:\([^\s()]*\)[^\s()]*)?)(?: "[^"]*")?\)/.exec(text.slice(end + 1, end + 2000));
  if (!found) return 0;
  flush();
  // A picture would be asked of another host: it is a link to it.
  inline(text.slice(open + 1, end), anchor(found[1], parent), depth + 1);
  return end + 1 + found[0].length;
}

// An element for what leads there; one that leads nowhere if the address is of any other kind.
function anchor(url, parent) {
  return /^(https?:\/\/|mailto:)/i.test(url)
    ? element("a", parent, { href: url, rel: "noopener noreferrer", target: "_blank" })
    : element("span", parent);
}
