"""Records what a command shows on a terminal, and draws it as an animated WebP."""

import os
import pty
import select
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyte
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image, ImageDraw, ImageFont

from clipfilter_wds.palette import DARK

# Pixels of the file, of which a sharp screen puts two where an ordinary one has one.
FONT_SIZE, LINE_HEIGHT, PADDING = 26, 36, 36
#: Seconds: between two frames at least, of a pause at most, and how long the last frame stays.
FRAME, PAUSE, END = 0.12, 0.6, 6.0

#: The terminal's own sixteen colours, as the palette has them; pyte gives the others as rrggbb.
COLOURS = {
    "default": DARK.ink,
    "black": DARK.line,
    "red": DARK.dropped,
    "green": DARK.kept,
    "brown": DARK.dropped,
    "blue": DARK.kept,
    "magenta": DARK.dropped,
    "cyan": DARK.kept,
    "white": DARK.ink,
    "brightblack": DARK.faint,
    "brightmagenta": DARK.dropped,
}

#: Per line, the characters with their style.
Lines = tuple[tuple[pyte.screens.Char, ...], ...]


class Frame(NamedTuple):
    """What a terminal shows, and for how many seconds."""

    lines: Lines
    seconds: float


def record(command: Sequence[str], *, typed: str, columns: int = 100, rows: int = 40, cwd: Path) -> list[Frame]:
    """Run a command on a terminal of its own and return what that shows, frame by frame.

    Args:
        command: The program and its arguments.
        typed: What somebody types to start it, shown first.
        columns: Width of the terminal.
        rows: Its height; lines that scroll out of it are gone.
        cwd: Where it runs.

    Raises:
        RuntimeError: If the command fails; the message has the last that it showed.
    """
    screen = pyte.Screen(columns, rows)
    screen.set_mode(pyte.modes.LNM)
    stream = pyte.ByteStream(screen)
    stream.feed(b"$ ")
    frames = [Frame(_lines(screen), 0.8)]
    for character in typed:
        stream.feed(character.encode())
        frames.append(Frame(_lines(screen), 0.06))
    stream.feed(b"\r\n")
    shown = time.monotonic()
    for data in _run(command, columns, rows, cwd):
        before = _lines(screen)
        stream.feed(data)
        now = time.monotonic()
        if now - shown >= FRAME:  # what was there until this data came, and how long
            frames.append(Frame(before, min(now - shown, PAUSE)))
            shown = now
    return [*frames, Frame(_lines(screen), END)]


def _run(command: Sequence[str], columns: int, rows: int, cwd: Path) -> Iterator[bytes]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (rows, columns))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    last = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=environment) as process:
        os.close(theirs)
        try:
            while data := _read(ours):
                last = (last + data)[-2000:]
                yield data
        finally:
            os.close(ours)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}:\n{last.decode()}")


def _read(descriptor: int) -> bytes:
    """What the terminal got, or nothing when the command has closed it."""
    select.select([descriptor], [], [])
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux says so where others give an empty answer
        return b""


def _lines(screen: pyte.Screen) -> Lines:
    return tuple(tuple(screen.buffer[row][column] for column in range(screen.columns)) for row in range(screen.lines))


def write_animation(path: Path, frames: Sequence[Frame]) -> None:
    """Write frames as a WebP that repeats for ever, as high as the frame with most lines."""
    joined = _join_equal(frames)
    num_lines = max(_height(frame.lines) for frame in joined)
    first, *others = (_draw(frame.lines[:num_lines]) for frame in joined)
    durations = [round(1000 * frame.seconds) for frame in joined]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, lossless=True, method=4)


def _join_equal(frames: Sequence[Frame]) -> list[Frame]:
    joined: list[Frame] = []
    for frame in frames:
        if joined and joined[-1].lines == frame.lines:
            joined[-1] = Frame(frame.lines, max(joined[-1].seconds, frame.seconds))
        else:
            joined.append(frame)
    return joined


def _height(lines: Lines) -> int:
    return max((number for number, line in enumerate(lines, 1) if any(char.data.strip() for char in line)), default=1)


def _draw(lines: Lines) -> Image.Image:
    fonts = {weight: _font(weight) for weight in ("normal", "bold")}
    width = fonts["normal"].getlength("m")
    size = round(len(lines[0]) * width) + 2 * PADDING, len(lines) * LINE_HEIGHT + 2 * PADDING
    image = Image.new("RGB", size, DARK.paper)
    pen = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        for column, char in enumerate(line):
            if char.data.strip():
                at = PADDING + round(column * width), PADDING + row * LINE_HEIGHT
                pen.text(at, char.data, fill=_colour(char.fg), font=fonts["bold" if char.bold else "normal"])
    return image


def _font(weight: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans Mono", weight=weight)), FONT_SIZE)


def _colour(name: str) -> str:
    if name in COLOURS:
        return COLOURS[name]
    return COLOURS[name.removeprefix("bright")] if name.startswith("bright") else f"#{name}"
