"""The timeline of a simulation as SVG: the drawing of the page, for paper."""

from __future__ import annotations

from xml.sax.saxutils import escape

from llmux.sim.drawing import Drawing, Shape, Size, items_of, look
from llmux.sim.story import story_of
from llmux.sim.world import Result

WIDTH = 1200.0
PAPER, TEXT, DIM, RAIL, LINE, BAD = "#ffffff", "#16191d", "#565e69", "#f3f5f7", "#d5dae1", "#a5171d"
END, MIDDLE = 'text-anchor="end"', 'text-anchor="middle"'


def svg(result: Result) -> str:
    """One lane per GPU and below one per model that waited or failed; seconds from the trace's
    beginning."""
    drawn = drawing(result)
    y, lines = drawn.height + 14, []
    for words in [*_legend(drawn), f'<tspan fill="{DIM}">{escape(look()["legend"])}</tspan>']:
        lines.append(f'<text x="2" y="{y:.0f}" fill="{TEXT}">{words}</text>')
        y += 18
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:.0f}" height="{y:.0f}"'
        ' font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH:.0f}" height="{y:.0f}" fill="{PAPER}"/>\n'
        + "\n".join([*map(_element, drawn.shapes), *lines])
        + "\n</svg>\n"
    )


def drawing(result: Result) -> Drawing:
    story = story_of(result.events, 0.0, result.ended)
    size = Size(WIDTH, 1.0, result.gpu_count)
    items = items_of(story, result.gpu_count)
    return Drawing(story, items, (0.0, result.ended), size, _seconds)


def _seconds(time: float) -> str:
    return f"{round(time, 1):g} s" if time < 1e5 else f"{time:.0f} s"


def _legend(drawn: Drawing) -> list[str]:
    """Each model with its colour, as many in a line as fit."""
    lines: list[str] = []
    room = 0.0
    for name, (fill, _) in drawn.colours.items():
        width = look()["letter"] * (len(name) + 4)
        if width > room:
            lines.append("")
            room = WIDTH
        room -= width
        lines[-1] += f'<tspan fill="{fill}">■</tspan> {escape(name)}   '
    return lines


def _element(shape: Shape) -> str:
    title = f"<title>{escape(shape['title'])}</title>" if "title" in shape else ""
    match shape["kind"]:
        case "label":
            most = _text(shape["mostX"], shape["y"], shape["most"], f'fill="{DIM}" {END}')
            return _text(shape["x"], shape["y"], shape["text"], f'fill="{TEXT}"') + most
        case "rail":
            return f'<rect {_box(shape)} fill="{RAIL}"/>'
        case "span":
            rect = (
                f'<rect {_box(shape)} fill="{shape["fill"]}" fill-opacity="{shape["opacity"]}">'
                f"{title}</rect>"
            )
            x, y = shape["x"] + 4, shape["y"] + shape["height"] / 2 + 4
            return rect + _text(x, y, shape["inside"], f'fill="{shape["ink"]}" font-weight="600"')
        case "wait":
            path = "L".join(f"{x:.2f},{y:.2f}" for x, y in shape["points"])
            fill, opacity = shape["fill"], shape["opacity"]
            return f'<path d="M{path}Z" fill="{fill}" fill-opacity="{opacity}">{title}</path>'
        case "failure":
            west, east = shape["x"] - shape["arm"], shape["x"] + shape["arm"]
            north, south = shape["y"] - shape["arm"], shape["y"] + shape["arm"]
            path = (
                f"M{west:.2f},{north:.2f}L{east:.2f},{south:.2f}"
                f"M{east:.2f},{north:.2f}L{west:.2f},{south:.2f}"
            )
            return f'<path d="{path}" fill="none" stroke="{BAD}" stroke-width="2.5">{title}</path>'
        case _:
            x, y = shape["x"], shape["y"]
            line = f'<line x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{y:.2f}" stroke="{LINE}"/>'
            return line + _text(x, shape["textY"], shape["text"], f'fill="{DIM}" {MIDDLE}')


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" {attributes}>{escape(text)}</text>' if text else ""


def _box(shape: Shape) -> str:
    return " ".join(f'{key}="{shape[key]:.2f}"' for key in ("x", "y", "width", "height"))
