// How the timeline looks, for the page and for `llmux sim --plot`, which reads what follows as JSON:
// colours with the ink of words on them, opacity by state, sizes in px, seconds between marks of the axis.
export default {
  "colours": [
    ["#4269d0", "#ffffff"], ["#efb118", "#10151c"], ["#3ca951", "#10151c"], ["#ff725c", "#10151c"],
    ["#a463f2", "#10151c"], ["#97bbf5", "#10151c"], ["#9c6b4e", "#ffffff"], ["#6cc5b0", "#10151c"]
  ],
  "shades": { "serving": 1, "draining": 0.6, "parking": 0.35, "starting": 0.35, "waking": 0.35, "stopping": 0.2 },
  "lane": 26, "slot": 14, "thin": 18, "gap": 6, "axis": 22, "right": 8,
  "left": { "narrow": 92, "wide": 150, "from": 600 },
  "letter": 7.5,
  "wait": 0.8,
  "steps": [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400],
  "legend": "full: serving; paler: draining; pale: on its way; bands below: requests that wait, with the most there were; ✕: failure"
};
