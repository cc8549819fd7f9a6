// Markdown to nodes. Text only ever becomes textContent, so that nothing in it can run.

function element(name, text) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  return node;
}

const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*/;

function inline(parent, text) {
  for (;;) {
    const match = INLINE.exec(text);
    if (!match) break;
    if (match.index) parent.append(text.slice(0, match.index));
    const [all, code, strong, emphasis] = match;
    if (code !== undefined) parent.append(element("code", code));
    else if (strong !== undefined) parent.append(element("strong", strong));
    else parent.append(element("em", emphasis));
    text = text.slice(match.index + all.length);
  }
  if (text) parent.append(text);
  return parent;
}

function codeBlock(lines) {
  const block = element("div");
  block.className = "block";
  const pre = element("pre");
  pre.append(element("code", lines.join("\n")));
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.addEventListener("click", () => navigator.clipboard.writeText(lines.join("\n")));
  block.append(pre, copy);
  return block;
}

export function render(target, text) {
  const nodes = [];
  const lines = text.split("\n");
  let list = null;
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const fence = /^\s*```/.test(line);
    const item = /^\s*(?:[-*+]|(\d+)[.)])\s+(.*)$/.exec(line);
    const heading = /^(#{1,4})\s+(.*)$/.exec(line);
    if (!item) list = null;
    if (fence) {
      const code = [];
      for (i++; i < lines.length && !/^\s*```/.test(lines[i]); i++) code.push(lines[i]);
      i++;
      nodes.push(codeBlock(code));
    } else if (item) {
      const kind = item[1] ? "OL" : "UL";
      if (!list || list.tagName !== kind) {
        nodes.push((list = element(kind)));
        if (item[1]) list.start = Number(item[1]);
      }
      list.append(inline(element("li"), item[2]));
      i++;
    } else if (heading) {
      nodes.push(inline(element(`h${Math.min(heading[1].length + 1, 4)}`), heading[2]));
      i++;
    } else if (line.startsWith("> ")) {
      const quote = [];
      for (; i < lines.length && lines[i].startsWith(">"); i++) quote.push(lines[i].replace(/^> ?/, ""));
      nodes.push(inline(element("blockquote"), quote.join("\n")));
    } else if (!line.trim()) {
      i++;
    } else {
      const paragraph = [];
      const ends = /^\s*```|^#{1,4}\s|^> |^\s*(?:[-*+]|\d+[.)])\s/;
      do paragraph.push(lines[i++]);
      while (i < lines.length && lines[i].trim() && !ends.test(lines[i]));
      nodes.push(inline(element("p"), paragraph.join("\n")));
    }
  }
  target.replaceChildren(...nodes);
}
