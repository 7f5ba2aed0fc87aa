"""A walk's surroundings as text that the engine reads: cells, walls with textures, doors, things; many maps to one WAD.

Format: UDMF in namespace "zdoom" (one-sided lines with the room on their right hand), three lumps a map. The engine
builds the BSP itself, so a map is written in a millisecond::

    data = wad([textmap(Scene(cells=((0, 0), (0, 1)), wall="STONE2", floor="FLOOR0_1", ceiling="CEIL1_1", light=200))])

Sources: the UDMF 1.1 specification, ZDoom's UDMF extensions (``special=11`` is Door_Open), ZDoom's DECORATE and KEYCONF
lumps.
"""

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from .presets import CELL, HEADINGS

HALF = CELL // 2
HEIGHT = 192  # units from floor to ceiling
DOOR_AT, DOOR_END = HALF - 16, HALF  # a door fills the cell from here to here, in units ahead of its centre
DOOR_SPEED = 64  # eighths of a unit a tick: wholly open in 24 ticks
DOOR_WALL, DOOR_TRACK = "BIGDOOR1", "DOORTRAK"
PLAYER_START = 1
# Doom's marine gains 1.6 units a tick at most and would lag behind the camera's plan; this one gains up to 6.25.
WALKER = b"""ACTOR Walker : DoomPlayer { Player.ForwardMove 4, 4 Player.SideMove 4, 4 Player.StartItem "Fist" }\n"""
KEYCONF = b"clearplayerclasses\naddplayerclass Walker\n"


class Thing(NamedTuple):
    """An object of the engine's by its editor number, at (x, y) units, drawn ``scale`` times as large."""

    type: int
    x: float
    y: float
    angle: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class Scene:
    """What one map holds.

    ``cells`` are walked through in this order; only neighbours in the order are open to each other. ``walls`` gives a
    wall a texture other than ``wall``: key (index of the cell, direction as an index into HEADINGS). ``doors`` closes
    cells: index -> direction.
    """

    cells: tuple[tuple[int, int], ...]
    wall: str
    floor: str
    ceiling: str
    light: int
    walls: dict[tuple[int, int], str] = field(default_factory=dict)
    doors: dict[int, int] = field(default_factory=dict)
    things: tuple[Thing, ...] = ()


class _Map:
    """UDMF blocks in the making: vertices are shared, each line brings its sides along."""

    def __init__(self):
        self.vertices: dict[tuple[float, float], int] = {}
        self.sides: list[str] = []
        self.lines: list[str] = []

    def _side(self, sector: int, texture: str, part: str) -> int:
        self.sides.append(f'sidedef{{sector={sector};texture{part}="{texture}";}}')
        return len(self.sides) - 1

    def line(self, a, b, front: tuple[int, str], back: int | None = None, extra: str = "") -> None:
        """A line from a to b. ``front``: (sector, texture) on the right hand; with a ``back`` sector: a door's face."""
        v1, v2 = (self.vertices.setdefault(point, len(self.vertices)) for point in (a, b))
        text = f"v1={v1};v2={v2};sidefront={self._side(*front, 'middle' if back is None else 'top')};"
        if back is None:
            text += "blocking=true;"
        else:
            text += f"sideback={self._side(back, '-', 'middle')};twosided=true;{extra}"
        self.lines.append(f"linedef{{{text}}}")


def point(cell: tuple[int, int], heading: int, ahead: float, aside: float) -> tuple[float, float]:
    """Units on the map of what lies ``ahead`` of a cell's centre in a heading, and ``aside`` (positive: right hand)."""
    (dx, dy), (rx, ry) = HEADINGS[heading], HEADINGS[(heading + 1) % 4]
    return (cell[0] + 0.5) * CELL + dx * ahead + rx * aside, (cell[1] + 0.5) * CELL + dy * ahead + ry * aside


def textmap(scene: Scene) -> bytes:
    """The TEXTMAP lump of a scene; the player starts in the centre of the first cell, facing north."""
    made = _Map()
    sector_of = {cell: k for k, cell in enumerate(sorted(scene.doors), 1)}
    for k, cell in enumerate(scene.cells):
        near = scene.cells[max(k - 1, 0) : k] + scene.cells[k + 1 : k + 2]
        for direction, (dx, dy) in enumerate(HEADINGS):
            if (cell[0] + dx, cell[1] + dy) not in near:
                _wall(made, scene, k, direction, sector_of)
        if k in sector_of:
            _door(made, cell, scene.doors[k], sector_of[k])
    x, y = point(scene.cells[0], 0, 0, 0)
    flats = f'texturefloor="{scene.floor}";textureceiling="{scene.ceiling}";lightlevel={scene.light};'
    blocks = ['namespace="zdoom";']
    blocks += [f"vertex{{x={vx};y={vy};}}" for vx, vy in made.vertices]
    blocks += made.sides + made.lines
    blocks += [f"sector{{heightceiling={HEIGHT};{flats}}}"]
    blocks += [f"sector{{heightceiling=0;id={sector};{flats}}}" for sector in sector_of.values()]
    blocks += [_thing(thing) for thing in (Thing(PLAYER_START, x, y, 90), *scene.things)]
    return "\n".join(blocks).encode()


def _wall(made: _Map, scene: Scene, k: int, direction: int, sector_of: dict[int, int]) -> None:
    """The wall of cell k in a direction, in two pieces where a door's end stands in it."""
    cell, texture = scene.cells[k], scene.walls.get((k, direction), scene.wall)
    cuts = [(-HALF, HALF, 0, texture)]
    if k in sector_of and (direction - scene.doors[k]) % 4 == 3:  # on the door's left hand: runs along the heading
        cuts = [(-HALF, DOOR_AT, 0, texture), (DOOR_AT, DOOR_END, sector_of[k], DOOR_TRACK)]
    elif k in sector_of and (direction - scene.doors[k]) % 4 == 1:  # on its right hand: runs against it
        cuts = [(-DOOR_END, -DOOR_AT, sector_of[k], DOOR_TRACK), (-DOOR_AT, HALF, 0, texture)]
    for begin, end, sector, name in cuts:
        made.line(point(cell, direction, HALF, begin), point(cell, direction, HALF, end), (sector, name))


def _door(made: _Map, cell: tuple[int, int], heading: int, sector: int) -> None:
    """The two faces of a door; the near one opens it for good when the player uses it."""
    opens = f"special=11;arg0={sector};arg1={DOOR_SPEED};playeruse=true;"
    left, right = (point(cell, heading, DOOR_AT, aside) for aside in (-HALF, HALF))
    made.line(left, right, (0, DOOR_WALL), sector, opens)
    left, right = (point(cell, heading, DOOR_END, aside) for aside in (-HALF, HALF))
    made.line(right, left, (0, DOOR_WALL), sector)


def _thing(thing: Thing) -> str:
    skills = "".join(f"skill{k}=true;" for k in range(1, 6))
    where = f"type={thing.type};x={thing.x};y={thing.y};angle={thing.angle};"
    return f"thing{{{where}scalex={thing.scale:.2f};scaley={thing.scale:.2f};{skills}single=true;}}"


def map_name(number: int) -> str:
    """The name of the map with this number, from 0: MAP01, MAP02, …"""
    return f"MAP{number + 1:02d}"


def wad(maps: list[bytes]) -> bytes:
    """A PWAD of the maps, named by :func:`map_name`, with the walker's own player class."""
    lumps = [("DECORATE", WALKER), ("KEYCONF", KEYCONF)]
    for number, text in enumerate(maps):
        lumps += [(map_name(number), b""), ("TEXTMAP", text), ("ENDMAP", b"")]
    data, directory = b"", b""
    for name, lump in lumps:
        directory += struct.pack("<ii8s", 12 + len(data), len(lump), name.encode())
        data += lump
    return b"PWAD" + struct.pack("<ii", len(lumps), 12 + len(data)) + data + directory
