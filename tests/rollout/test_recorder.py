import imageio_ffmpeg
import pytest

from ipvla.rollout.episode import run_episode
from ipvla.rollout.recorder import VideoRecorder
from tests.rollout.point import PointSimulator
from tests.rollout.test_episode import right, spec


def test_the_video_has_the_frames_of_the_episode(tmp_path):
    recorder = VideoRecorder(size=64, every=2)
    run_episode(PointSimulator("recall_go"), spec(2), right, [recorder])
    assert [frame.shape for frame in recorder.frames] == [(64, 64, 3)] * 4  # reset, steps 2 and 4, the end
    path = recorder.save(tmp_path / "videos" / "a.mp4")
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    assert (frames, seconds) == (4, pytest.approx(0.4, abs=0.05))
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_the_video_plays_at_the_environments_rate(tmp_path):
    recorder = VideoRecorder(size=64, every=1, control_hz=50)
    run_episode(PointSimulator("recall_go"), spec(2), right, [recorder])
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(recorder.save(tmp_path / "a.mp4")))
    assert seconds == pytest.approx(frames / 50, abs=0.01)


@pytest.mark.parametrize("settings", [{"size": 100}, {"size": 0}, {"every": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match="use"):
        VideoRecorder(**settings)
