// A tree of plain values, and the smallest change of the document that makes it look like that.
// Text is only ever set as text: nothing that a model, an engine or a user wrote becomes markup.

const SVG = "http://www.w3.org/2000/svg";
// An option that was chosen by hand heeds its attribute no more.
const PROPERTIES = new Set(["disabled", "hidden", "open", "selected"]);

// h("button", {key, class, onclick, style: {"--x": "3%"}, …attributes}, children…)
export function h(tag, attributes, ...children) {
  return { tag, attributes: attributes ?? {}, children: children.flat(Infinity).filter(shown) };
}

const shown = (child) => child !== null && child !== undefined && child !== false && child !== true;

export function render(parent, ...children) {
  patch(parent, children.flat(Infinity).filter(shown));
}

function patch(parent, children) {
  const keyed = new Map();
  for (const node of parent.childNodes) if (node.llmuxKey !== undefined) keyed.set(node.llmuxKey, node);
  let cursor = parent.firstChild;
  for (const child of children) {
    if (typeof child !== "object") {
      cursor = patchText(parent, cursor, String(child));
      continue;
    }
    let node = match(child, cursor, keyed);
    if (node === null) {
      node = create(parent, child);
      parent.insertBefore(node, cursor);
    } else if (node === cursor) {
      cursor = cursor.nextSibling;
    } else {
      parent.insertBefore(node, cursor);
    }
    update(node, child);
  }
  while (cursor !== null) {
    const next = cursor.nextSibling;
    cursor.remove();
    cursor = next;
  }
}

function patchText(parent, cursor, text) {
  if (cursor !== null && cursor.nodeType === Node.TEXT_NODE) {
    if (cursor.data !== text) cursor.data = text;
    return cursor.nextSibling;
  }
  parent.insertBefore(document.createTextNode(text), cursor);
  return cursor;
}

function match(child, cursor, keyed) {
  const key = child.attributes.key;
  if (key !== undefined) {
    const node = keyed.get(key);
    return node !== undefined && node.localName === child.tag ? node : null;
  }
  const same = cursor !== null && cursor.localName === child.tag && cursor.llmuxKey === undefined;
  return same ? cursor : null;
}

function create(parent, child) {
  const svg = child.tag === "svg" || parent.namespaceURI === SVG;
  const node = svg ? document.createElementNS(SVG, child.tag) : document.createElement(child.tag);
  node.llmuxKey = child.attributes.key;
  node.llmuxAttributes = {};
  if (child.attributes.value !== undefined) node.value = child.attributes.value;
  return node;
}

function update(node, child) {
  const former = node.llmuxAttributes ?? {};
  const wanted = child.attributes;
  for (const name in former) if (!(name in wanted)) set(node, name, null, former[name]);
  for (const name in wanted) if (former[name] !== wanted[name]) set(node, name, wanted[name], former[name]);
  node.llmuxAttributes = wanted;
  if (!wanted.own) patch(node, child.children); // own: its content is someone else's
}

function set(node, name, value, former) {
  if (name === "key" || name === "own" || name === "value") return;
  if (name.startsWith("on")) {
    node[name] = value;
  } else if (name === "style") {
    for (const part in value ?? {}) {
      if (former?.[part] !== value[part]) node.style.setProperty(part, value[part]);
    }
  } else if (PROPERTIES.has(name)) {
    node[name] = Boolean(value);
  } else if (value === null || value === undefined || value === false) {
    node.removeAttribute(name);
  } else {
    node.setAttribute(name, value === true ? "" : value);
  }
}
