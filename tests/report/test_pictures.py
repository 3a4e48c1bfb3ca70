"""Small pictures of samples."""

import base64
import io

import pytest
from PIL import Image

from clipfilter_wds.report.pictures import MAX_THUMBNAIL_BYTES, thumbnail
from clipfilter_wds.types import DropReason, UnusableError
from tests.support.toys import encoded, photo


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
def test_thumbnails_are_small_rgb_jpegs(mode):
    data = encoded(photo(1, (2000, 900)).convert(mode), "TIFF")
    small = base64.b64decode(thumbnail(data, max_pixels=10**7).removeprefix("data:image/jpeg;base64,"))
    image = Image.open(io.BytesIO(small))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (240, 108))
    assert len(small) <= MAX_THUMBNAIL_BYTES


def test_what_is_no_picture_has_no_thumbnail():
    with pytest.raises(UnusableError) as unusable:
        thumbnail(b"%!PS-Adobe-3.0 EPSF-3.0", max_pixels=10**7)
    assert unusable.value.reason is DropReason.UNREADABLE_IMAGE
    with pytest.raises(UnusableError) as unusable:
        thumbnail(encoded(photo(0)), max_pixels=100)
    assert unusable.value.reason is DropReason.IMAGE_TOO_LARGE
