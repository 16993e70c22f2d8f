"""Pipelines of videos as pipelines of pictures."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import arguments_of, tiny_pipeline_of

from mm.core.errors import UserError
from mm.families.frames import one_frame, pictures_of


def test_a_video_of_one_frame_is_a_picture_and_a_longer_one_is_refused():
    pipe = tiny_pipeline_of("wan")
    (picture,) = pictures_of(pipe(**arguments_of("wan", **one_frame(("num_frames", "prompt")))))
    assert picture.size == (32, 32)
    with pytest.raises(UserError, match="returned 2 frames; mm draws pictures, no videos"):
        pictures_of(pipe(**arguments_of("wan", num_frames=5)))  # two, as this autoencoder counts them
    assert one_frame(("prompt",)) == {}
    with pytest.raises(UserError, match="without pictures"):
        pictures_of(torch.zeros(1))
