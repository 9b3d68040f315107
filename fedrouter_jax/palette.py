"""How kinds are told apart in pictures: Okabe and Ito's colours, safe for colour-blind readers, and four more."""

PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#4D4D4D", "#8B4513", "#9ACD32",
)  # fmt: skip
GREY, MARKERS = "#8C8C8C", "osD^vPX*"
DASHES, HATCHES = ("-", "--", ":", "-."), ("", "///", "...", "xxx")  # of colours that come again


def look(place: int) -> dict:
    """Colour and dash of the n-th line; they repeat after 40."""
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": DASHES[place // len(PALETTE) % len(DASHES)]}
