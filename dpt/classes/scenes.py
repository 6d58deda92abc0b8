"""The classes of rendered scenes and their colours, for those who need no renderer."""

CLASSES: tuple[str, ...] = ("sky", "floor", "wall", "table", "robot arm", "mobile robot", "ball", "block", "object")
PALETTE: tuple[tuple[int, int, int], ...] = (
    (135, 190, 235),
    (120, 100, 80),
    (200, 195, 180),
    (150, 75, 30),
    (240, 130, 30),
    (30, 90, 220),
    (250, 220, 40),
    (220, 40, 40),
    (110, 60, 200),
)
