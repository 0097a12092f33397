"""The drawings, names and splits of the demo sets, without building a corpus."""

import io

import av
import numpy as np

from pipeline.data.demo import digits, emoji, moving, sound


def test_whole_split_holds_out_a_fifth_of_every_class():
    splits = digits.split_by_class(digits.load()[1])
    for digit in range(10):
        held_out, train = splits["held_out"][digit], splits["train"][digit]
        assert len(held_out) == round(0.2 * (len(held_out) + len(train)))
        assert set(held_out).isdisjoint(train)
    assert sum(len(indices) for by_class in splits.values() for indices in by_class.values()) == 1797


def test_emoji_names_fall_into_looks_and_families():
    assert emoji.readable_name(":woman’s_hat:") == "womans hat"
    name = "woman walking facing right medium-dark skin tone"
    assert emoji.look_of(name) == "woman walking facing right"
    assert emoji.family_of(name) == emoji.family_of("man walking") == "walking"
    assert emoji.family_of("man dark skin tone") == emoji.family_of("woman") == "person"
    assert emoji.family_of("light skin tone") == "light skin tone"


def test_names_of_one_drawing_share_its_row():
    assert emoji.shown_names(["man cook", "cook"]) == ["cook", "man cook"]
    assert emoji.shown_names(["people wrestling light skin tone", "people wrestling"]) == ["people wrestling"]


def test_emoji_splits_hold_out_one_sibling_a_look_and_whole_families():
    names = {svg.stem: names[0] for svg, names in emoji.load().items()}
    splits = {split: [names[points] for points in held] for split, held in emoji.split_rows(names).items()}
    assert sum(len(held) for held in splits.values()) == len(names) > 3700
    siblings, unseen = splits["held_out_siblings"], splits["held_out_unseen"]
    assert 250 <= len(siblings) <= 400 and len(unseen) == 250
    looks = [emoji.look_of(name) for name in siblings]
    assert len(looks) == len(set(looks))
    assert set(looks) <= {emoji.look_of(name) for name in splits["train"]}
    seen = {emoji.family_of(name) for name in splits["train"] + siblings}
    assert seen.isdisjoint(emoji.family_of(name) for name in unseen)


def test_decoded_media_match_what_was_drawn():
    job = moving.plan(limit=1).jobs[0]
    rng = np.random.Generator(np.random.PCG64(3))
    drawn = moving.draw(digits.draw(job["values"]), rng, direction="up")
    wave = sound.tone(5, rng, num_samples=moving.NUM_SAMPLES)
    with av.open(io.BytesIO(moving.encode(drawn, wave))) as container:
        packets = [frame for packet in container.demux() for frame in packet.decode()]
    pictures = np.stack([frame.to_ndarray(format="gray") for frame in packets if isinstance(frame, av.VideoFrame)])
    heard = np.concatenate([frame.to_ndarray()[0] for frame in packets if isinstance(frame, av.AudioFrame)])
    assert np.abs(pictures.astype(int) - drawn).mean() < 5
    # Without a shift: the encoder's delay must not move the sound against the picture.
    assert np.corrcoef(heard[: len(wave)], wave)[0, 1] > 0.9


def test_directions_are_balanced_over_digits_and_splits():
    classes = digits.load()[1]
    direction = moving.directions(classes)
    for by_class in digits.split_by_class(classes).values():
        for indices in by_class.values():
            counts = [sum(direction[index] == name for index in indices) for name in moving.DIRECTIONS]
            assert max(counts) - min(counts) <= 1


def test_sounds_of_digits_differ():
    rng = np.random.Generator(np.random.PCG64(0))

    def spectrum(digit):
        windows = sound.tone(digit, rng, num_samples=moving.NUM_SAMPLES)[:33_792].reshape(-1, 1024)
        power = (np.abs(np.fft.rfft(windows * np.hanning(1024))) ** 2).mean(0)[:257]
        return np.log(power / power.sum() + 1e-6)

    known = np.stack([np.mean([spectrum(digit) for _ in range(8)], 0) for digit in range(10)])
    heard = np.stack([spectrum(digit) for digit in range(10) for _ in range(4)])
    guesses = ((heard[:, None] - known) ** 2).sum(-1).argmin(1)
    assert (guesses == np.repeat(np.arange(10), 4)).mean() >= 0.95
