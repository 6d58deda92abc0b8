"""What stands in a procedural scene: the PyBullet client, the objects, the room and the camera.

`dpt.scenes.rendering` draws it. PyBullet is imported on first use, since it is an extra.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from .surfaces import Surface, quaternion, random_rotation, random_surface, rotation_z, tint

# What scenes are composed of, finer than the classes (`scene_classes`), and the class of each.
SKY, FLOOR, WALL, TABLE, ARM, LEGGED, WHEELED, BALL, BOX, CYLINDER, TOY, RANDOM = range(12)
CLASS_OF = np.array([0, 1, 2, 3, 4, 5, 5, 6, 7, 7, 8, 8], dtype=np.uint8)

NEAR, FAR = 0.1, 80.0  # metres: the clipping planes
_SCENES_PER_CLIENT = 200


def load_pybullet() -> tuple[ModuleType, str]:
    """The pybullet module and the folder of pybullet_data. Raises ImportError, saying what to install, without them."""
    try:
        import pybullet
        import pybullet_data
    except ImportError as error:
        raise ImportError("rendering scenes needs PyBullet: pip install pybullet") from error
    return pybullet, pybullet_data.getDataPath()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what PyBullet's C code prints about the robots' files (missing inertias)."""
    saved = [os.dup(1), os.dup(2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        os.dup2(null, 2)
        yield
    finally:
        for stream, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(null)


class Client:
    """One headless PyBullet connection a process, emptied between scenes and renewed every so often, since emptying leaks a little."""

    def __init__(self) -> None:
        self.process = -1
        self.number = -1
        self.scenes = 0

    def fresh(self) -> int:
        """The number of a connection with nothing in it."""
        bullet, data = load_pybullet()
        if self.process != os.getpid() or self.scenes >= _SCENES_PER_CLIENT:
            self.close()
            self.number = bullet.connect(bullet.DIRECT)
            self.process, self.scenes = os.getpid(), 0
            bullet.setAdditionalSearchPath(data, physicsClientId=self.number)
        bullet.resetSimulation(physicsClientId=self.number)
        self.scenes += 1
        return self.number

    def close(self) -> None:
        if self.process == os.getpid():
            load_pybullet()[0].disconnect(self.number)
            self.process = -1


shared_client = Client()
atexit.register(shared_client.close)


@dataclass(frozen=True)
class Body:
    """What the picture needs to know of a body: its class, its surface, and where its own axes lie in the world."""

    label: int
    surface: Surface
    position: np.ndarray
    rotation: np.ndarray


@dataclass(frozen=True)
class Support:
    """A horizontal disc that objects may stand on."""

    centre: np.ndarray  # (3,)
    radius: float


@dataclass
class World:
    """What stands in the simulation so far."""

    rng: np.random.Generator
    client: int
    random_objects: range
    bodies: dict[int, Body] = field(default_factory=dict)
    supports: list[Support] = field(default_factory=list)
    occupied: list[tuple[np.ndarray, float]] = field(default_factory=list)  # discs on the floor: centre (2,), radius

    def add_shape(
        self,
        label: int,
        surface: Surface,
        position: np.ndarray,
        rotation: np.ndarray,
        colour: tuple[float, ...] | None = (1, 1, 1, 1),
        **shape: Any,
    ) -> None:
        bullet, _ = load_pybullet()
        if colour is not None:
            shape["rgbaColor"] = colour
        visual = bullet.createVisualShape(physicsClientId=self.client, **shape)
        body = bullet.createMultiBody(0, -1, visual, position.tolist(), quaternion(rotation), physicsClientId=self.client)
        self.bodies[body] = Body(label, surface, position, rotation)

    def add_block(self, label: int, surface: Surface, position: np.ndarray, rotation: np.ndarray, half: np.ndarray) -> None:
        self.add_shape(label, surface, position, rotation, shapeType=load_pybullet()[0].GEOM_BOX, halfExtents=half.tolist())

    def add_mesh(
        self, label: int, surface: Surface, foot: np.ndarray, rotation: np.ndarray, path: str, size: float, colour: tuple[float, ...] | None
    ) -> float:
        """Put a mesh, its longest side `size`, with its lowest point on `foot` and its middle above it. Returns its height."""
        bullet, _ = load_pybullet()
        vertices = _vertices(path)
        scale = size / float(np.ptp(vertices, axis=0).max())
        turned = scale * vertices @ rotation.T
        low, high = turned.min(axis=0), turned.max(axis=0)
        position = foot - np.array([*(low + high)[:2] / 2.0, low[2]])
        self.add_shape(label, surface, position, rotation, colour, shapeType=bullet.GEOM_MESH, fileName=path, meshScale=[scale] * 3)
        return float(high[2] - low[2])

    def add_urdf(self, label: int, surface: Surface, foot: np.ndarray, yaw: float, robot: Robot, size: float) -> None:
        """Put a robot on `foot`, its joints near the table's pose; with its collision shapes it is set down on its lowest point."""
        bullet, _ = load_pybullet()
        client = {"physicsClientId": self.client}
        flags = 0 if robot.set_down else bullet.URDF_IGNORE_COLLISION_SHAPES
        rotation = rotation_z(yaw)
        with _quiet():
            body = bullet.loadURDF(
                robot.path, foot.tolist(), quaternion(rotation), globalScaling=size / robot.size, useFixedBase=1, flags=flags, **client
            )
        joints = range(bullet.getNumJoints(body, **client))
        for joint in joints:
            self._pose(body, joint, robot)
        position = foot
        if robot.set_down:
            lowest = min(bullet.getAABB(body, link, **client)[0][2] for link in (-1, *joints))
            position = foot + np.array([0.0, 0.0, foot[2] - lowest])
            inertial, orientation = bullet.getBasePositionAndOrientation(body, **client)
            bullet.resetBasePositionAndOrientation(body, (np.array(inertial) + position - foot).tolist(), orientation, **client)
        self.bodies[body] = Body(label, surface, position, rotation)

    def _pose(self, body: int, joint: int, robot: Robot) -> None:
        bullet, _ = load_pybullet()
        info = bullet.getJointInfo(body, joint, physicsClientId=self.client)
        if info[2] != bullet.JOINT_REVOLUTE:
            return
        name, low, high = info[1].decode(), info[8], info[9]
        for part, (centre, spread) in robot.pose.items():
            if part in name:
                angle = centre + spread * self.rng.uniform(-1.0, 1.0)
                bullet.resetJointState(body, joint, angle if low >= high else min(max(angle, low), high), physicsClientId=self.client)
                return


@functools.cache
def _vertices(path: str) -> np.ndarray:
    """The vertices (N, 3) of an OBJ file of pybullet_data."""
    with open(os.path.join(load_pybullet()[1], path)) as lines:
        return np.array([line.split()[1:4] for line in lines if line.startswith("v ")], dtype=np.float64)


@dataclass(frozen=True)
class Robot:
    """A URDF file, the length in metres that `size` scales, and the joints' poses: part of a joint's name -> centre, spread (radians)."""

    path: str
    size: float
    pose: dict[str, tuple[float, float]] = field(default_factory=dict)
    set_down: bool = True


_UNITREE = {"hip": (0.0, 0.2), "upper": (0.8, 0.4), "lower": (-1.6, 0.35)}
_MINITAUR = {
    **{f"motor_{end}_left": (-0.5 * math.pi, 0.25) for end in ("front", "back")},
    **{f"motor_{end}_right": (0.5 * math.pi, 0.25) for end in ("front", "back")},
    **{f"knee_{end}_left": (2.18, 0.1) for end in ("front", "back")},
    **{f"knee_{end}_right": (-2.18, 0.1) for end in ("front", "back")},
}
_GHOST = {
    **{str(joint): (0.0, 0.2) for joint in (8, 9, 10, 11)},
    **{str(j): (0.8, 0.3) for j in (0, 2, 4, 6)},
    **{str(j): (1.5, 0.3) for j in (1, 3, 5, 7)},
}

ROBOTS: dict[int, tuple[Robot, ...]] = {
    ARM: (
        Robot("kuka_iiwa/model.urdf", 1.3, {"joint_1": (0, 3), "joint_": (0, 1.3)}, False),
        Robot("xarm/xarm6_robot.urdf", 0.9, {"joint1": (0, 3), "joint2": (0, 0.9), "joint3": (-1.0, 0.9), "joint": (0, 1.0)}, False),
        Robot("franka_panda/panda.urdf", 1.2, {"joint1": (0, 2.8), "joint2": (0, 0.9), "joint4": (-1.5, 1.0), "joint": (0, 1.0)}, False),
    ),
    LEGGED: (
        Robot("a1/a1.urdf", 0.55, _UNITREE),
        Robot("aliengo/aliengo.urdf", 0.7, _UNITREE),
        Robot("quadruped/minitaur.urdf", 0.55, _MINITAUR),
        Robot("quadruped/spirit40.urdf", 0.75, _GHOST),
        Robot("quadruped/vision60.urdf", 0.95, _GHOST),
    ),
    WHEELED: (
        Robot("husky/husky.urdf", 1.05),
        Robot("racecar/racecar.urdf", 0.5, {"steering": (0.0, 0.5)}),
        Robot("r2d2.urdf", 0.95, {"head": (0.0, 0.4)}),
    ),
}

TOYS = ("duck.obj", "teddy2_VHACD_CHs.obj", "bunny.obj", "torus/torus_textured.obj")
OWN_COLOURS = ("duck.obj", "torus/torus_textured.obj")
BALLS = ("soccerball.obj", "textured_sphere_smooth.obj")
PLAIN_BALL = "sphere_smooth.obj"  # PyBullet's own sphere is coarse

OBJECT_PERIOD, ROOM_PERIOD = (0.06, 0.5), (0.15, 2.5)  # metres: the range of the patterns' periods


def _object_surface(rng: np.random.Generator) -> Surface:
    return random_surface(rng, OBJECT_PERIOD, upright=False)


# One builder a class: it puts an object of a size in metres (its longest horizontal side, or its height if that is longer) on `foot`.


def _build_table(world: World, foot: np.ndarray, size: float) -> None:
    rng = world.rng
    yaw, height, thick = rng.uniform(0.0, math.pi), rng.uniform(0.4, 0.8), rng.uniform(0.02, 0.05)
    half = np.array([size / 2.0, size * rng.uniform(0.28, 0.5), thick / 2.0])
    rotation = rotation_z(yaw)
    top = random_surface(rng, OBJECT_PERIOD, upright=True)
    world.add_block(TABLE, top, foot + [0.0, 0.0, height - thick / 2.0], rotation, half)
    legs = top if rng.random() < 0.5 else _object_surface(rng)
    width = rng.uniform(0.02, 0.045)
    for side in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        corner = rotation @ np.array([side[0] * (half[0] - width), side[1] * (half[1] - width), 0.0])
        leg = np.array([width, width, (height - thick) / 2.0])
        world.add_block(TABLE, legs, foot + corner + [0.0, 0.0, leg[2]], rotation, leg)
    for end in (-0.5, 0.5):
        centre = foot + rotation @ np.array([end * half[0], 0.0, height])
        world.supports.append(Support(centre, min(half[0] / 2.0, half[1])))


def _build_robot(label: int, world: World, foot: np.ndarray, size: float) -> None:
    models = ROBOTS[label]
    robot = models[world.rng.integers(len(models))]
    world.add_urdf(label, tint(world.rng), foot, world.rng.uniform(0.0, 2.0 * math.pi), robot, size)


def _build_ball(world: World, foot: np.ndarray, size: float) -> None:
    rng = world.rng
    if rng.random() < 0.4:
        world.add_mesh(BALL, tint(rng), foot, random_rotation(rng), BALLS[rng.integers(len(BALLS))], size, None)
    else:
        world.add_mesh(BALL, _object_surface(rng), foot, random_rotation(rng), PLAIN_BALL, size, (1, 1, 1, 1))


def _build_box(world: World, foot: np.ndarray, size: float) -> None:
    rng = world.rng
    half = size / 2.0 * rng.uniform(0.35, 0.8, 3)
    world.add_block(
        BOX, random_surface(rng, OBJECT_PERIOD, upright=True), foot + [0.0, 0.0, half[2]], rotation_z(rng.uniform(0.0, math.pi)), half
    )
    world.supports.append(Support(foot + [0.0, 0.0, 2.0 * half[2]], min(half[0], half[1])))


def _build_cylinder(world: World, foot: np.ndarray, size: float) -> None:
    rng = world.rng
    radius, length = size * rng.uniform(0.12, 0.35), size * rng.uniform(0.7, 1.0)
    rotation, height = rotation_z(rng.uniform(0.0, 2.0 * math.pi)), length
    if rng.random() < 0.3:  # lying
        rotation, height = rotation @ np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]), 2.0 * radius
    surface = random_surface(rng, OBJECT_PERIOD, upright=True)
    shape = {"shapeType": load_pybullet()[0].GEOM_CYLINDER, "radius": radius, "length": length}
    world.add_shape(CYLINDER, surface, foot + [0.0, 0.0, height / 2.0], rotation, **shape)


def _build_toy(world: World, foot: np.ndarray, size: float) -> None:
    rng = world.rng
    path = TOYS[rng.integers(len(TOYS))]
    own = path in OWN_COLOURS and rng.random() < 0.6
    lean = random_rotation(rng) if rng.random() < 0.2 else np.eye(3)
    surface = tint(rng) if own else _object_surface(rng)
    world.add_mesh(TOY, surface, foot, rotation_z(rng.uniform(0.0, 2.0 * math.pi)) @ lean, path, size, None if own else (1, 1, 1, 1))


def _build_random_object(world: World, foot: np.ndarray, size: float) -> None:
    """One of the random objects, lying as the lowest of several random rotations would, which is close to how it would come to rest."""
    number = world.rng.choice(world.random_objects)
    path = f"random_urdfs/{number:03d}/{number:03d}.obj"
    vertices = _vertices(path)
    turns = [random_rotation(world.rng) for _ in range(12)]
    heights = [(vertices.mean(axis=0) @ turn[2]) - (vertices @ turn[2]).min() for turn in turns]
    world.add_mesh(RANDOM, _object_surface(world.rng), foot, turns[int(np.argmin(heights))], path, size, (1, 1, 1, 1))


@dataclass(frozen=True)
class Kind:
    """A class of object: its builder, its range of sizes on the floor, how much floor it takes (times its size), how many at most, and
    how often it is chosen."""

    build: Callable[[World, np.ndarray, float], None]
    sizes: tuple[float, float]
    floor: float
    most: int
    weight: float = 1.0


KINDS: dict[int, Kind] = {
    TABLE: Kind(_build_table, (1.0, 1.6), 0.55, 1),
    ARM: Kind(functools.partial(_build_robot, ARM), (1.1, 1.9), 0.3, 2),
    LEGGED: Kind(functools.partial(_build_robot, LEGGED), (0.8, 1.4), 0.5, 2),
    WHEELED: Kind(functools.partial(_build_robot, WHEELED), (0.8, 1.3), 0.5, 2, 1.4),
    BALL: Kind(_build_ball, (0.3, 0.8), 0.5, 3),
    BOX: Kind(_build_box, (0.6, 1.3), 0.45, 3),
    CYLINDER: Kind(_build_cylinder, (0.6, 1.4), 0.4, 3),
    TOY: Kind(_build_toy, (0.6, 1.1), 0.45, 3),
    RANDOM: Kind(_build_random_object, (0.7, 1.4), 0.4, 4, 2.0),
}
SMALL = (BALL, BOX, CYLINDER, TOY, RANDOM, RANDOM)  # what may stand on a table or a box


@dataclass(frozen=True)
class Camera:
    eye: np.ndarray  # (3,) metres
    target: np.ndarray  # (3,) metres
    roll: float  # radians
    field_of_view: float  # degrees, of both sides: pictures are square

    @property
    def distance(self) -> float:
        return float(np.linalg.norm(self.target - self.eye))

    def rotation(self) -> np.ndarray:
        """World to camera (3, 3): rows are right, up and backward."""
        backward = (self.eye - self.target) / self.distance
        right = np.cross([0.0, 0.0, 1.0], backward)
        right /= np.linalg.norm(right)
        up = np.cross(backward, right)
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        return np.stack([cos * right + sin * up, cos * up - sin * right, backward])

    def matrices(self, size: int) -> tuple[list[float], list[float]]:
        """View and projection, column-major. TinyRenderer samples a pixel at its corner; the projection is shifted by half a pixel so
        that it samples the middle, (column + 0.5, row + 0.5)."""
        rotation = self.rotation()
        view = np.eye(4)
        view[:3, :3], view[:3, 3] = rotation, -rotation @ self.eye
        focal = 1.0 / math.tan(math.radians(self.field_of_view) / 2.0)
        projection = np.zeros((4, 4))
        projection[0, 0] = projection[1, 1] = focal
        projection[0, 2] = projection[1, 2] = 1.0 / size
        projection[2, 2], projection[2, 3] = (FAR + NEAR) / (NEAR - FAR), 2.0 * FAR * NEAR / (NEAR - FAR)
        projection[3, 2] = -1.0
        return view.T.ravel().tolist(), projection.T.ravel().tolist()

    def rays(self, size: int) -> np.ndarray:
        """(H, W, 3): world vectors through the pixels' middles, 1 metre long along the optical axis."""
        slope = (2.0 * (np.arange(size) + 0.5) / size - 1.0) * math.tan(math.radians(self.field_of_view) / 2.0)
        across, down = np.meshgrid(slope, slope)
        rays: np.ndarray = np.stack([across, -down, -np.ones_like(across)], axis=-1) @ self.rotation()
        return rays


def place_camera(rng: np.random.Generator) -> Camera:
    """A camera that looks at the middle of the floor from 3 to 42 degrees above it."""
    target = np.array([0.0, 0.0, rng.uniform(0.1, 0.8)])
    distance, yaw, elevation = rng.uniform(1.7, 3.5), rng.uniform(0.0, 2.0 * math.pi), math.radians(rng.uniform(3.0, 42.0))
    away = np.array([math.cos(yaw) * math.cos(elevation), math.sin(yaw) * math.cos(elevation), math.sin(elevation)])
    return Camera(target + distance * away, target, rng.normal(0.0, math.radians(3.0)), rng.uniform(38.0, 66.0))


def _free_spot(world: World, camera: Camera, radius: float) -> np.ndarray | None:
    """A point (3,) on the floor in the camera's view, with `radius` around it free; None if eight guesses find none."""
    rng = world.rng
    forward = camera.target[:2] - camera.eye[:2]
    reach = float(np.linalg.norm(forward))
    heading = math.atan2(forward[1], forward[0])
    for _ in range(8):
        bearing = heading + math.radians(camera.field_of_view) * rng.uniform(-0.42, 0.42)
        along = reach * rng.uniform(0.5, 1.5)
        spot = camera.eye[:2] + along * np.array([math.cos(bearing), math.sin(bearing)])
        clear = all(np.linalg.norm(spot - centre) > radius + other for centre, other in world.occupied)
        if clear and along > radius + 0.7:
            return np.array([*spot, 0.0])
    return None


def furnish(world: World, camera: Camera) -> None:
    """Three to five kinds of objects on the floor, the larger kinds first; then small ones on what they can stand on."""
    rng = world.rng
    weights = np.array([kind.weight for kind in KINDS.values()])
    chosen = rng.choice(list(KINDS), size=rng.integers(3, 6), replace=False, p=weights / weights.sum())
    for label in sorted(chosen.tolist()):
        kind = KINDS[label]
        for _ in range(rng.integers(1, kind.most + 1)):
            size = rng.uniform(*kind.sizes)
            spot = _free_spot(world, camera, kind.floor * size)
            if spot is not None:
                world.occupied.append((spot[:2], kind.floor * size))
                kind.build(world, spot, size)
    for support in list(world.supports):
        if support.radius > 0.1 and rng.random() < 0.6:
            _put_on(world, support)


def _put_on(world: World, support: Support) -> None:
    rng = world.rng
    label = int(rng.choice([*SMALL, ARM])) if support.radius > 0.2 else int(rng.choice(SMALL))
    size = 1.9 * support.radius * rng.uniform(0.6, 1.0)
    KINDS[label].build(world, support.centre, size * (1.3 if label == ARM else 1.0))


def build_room(world: World, camera: Camera) -> None:
    """The floor, and in two scenes of three the walls that stand beyond the objects and do not hide them from the camera."""
    rng = world.rng
    world.add_block(
        FLOOR, random_surface(rng, ROOM_PERIOD, upright=True), np.array([0.0, 0.0, -0.1]), np.eye(3), np.array([60.0, 60.0, 0.1])
    )
    if rng.random() < 0.35:
        return
    yaw, height = rng.uniform(0.0, 0.5 * math.pi), rng.uniform(1.2, 3.5)
    shared = random_surface(rng, ROOM_PERIOD, upright=True)
    for quarter in range(4):
        turn = rotation_z(yaw + 0.5 * math.pi * quarter)
        outward = turn[:, 0]
        beyond = max((float(outward[:2] @ centre) + radius for centre, radius in world.occupied), default=0.0)
        offset = max(beyond, rng.uniform(0.5, 3.0)) + 0.06
        surface = shared if rng.random() < 0.7 else random_surface(rng, ROOM_PERIOD, upright=True)
        if rng.random() < 0.85 and float(outward @ camera.eye) < offset - 0.6:
            centre = outward * offset + [0.0, 0.0, height / 2.0]
            world.add_block(WALL, surface, centre, turn, np.array([0.05, 8.0, height / 2.0]))
