"""What align.py reads of a collection, on hand-made shards; projections against numpy."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.collection import Collection, difference, project

CPU = torch.device("cpu")
LAYERS = [1, 3]
WIDTH = 6

# two shards of responses: (tokens, first recorded position)
SHARDS = [[(7, 3), (5, 2)], [(4, 1), (9, 8)]]


def write_shards(folder, store):
    """Shards of random states. Returns their paths and for each response (ids, first recorded
    position, {"base.1": [T, D], ...})."""
    generator = torch.Generator().manual_seed(0)
    names = ("base", "plus", "minus") if store == "full" else ("base", "v")
    paths, responses = [], []
    for number, shard in enumerate(SHARDS):
        parts = []
        for length, first in shard:
            ids = torch.randint(2, 800, (length,), generator=generator, dtype=torch.int32)
            states = {}
            for name in names:
                for layer in LAYERS:
                    shape = (length - first, WIDTH)
                    states[f"{name}.{layer}"] = torch.randn(shape, generator=generator)
            parts.append((ids, first, states))
        tensors = {
            "ids": torch.cat([ids for ids, _, _ in parts]),
            "lengths": torch.tensor([length for length, _ in shard]),
            "starts": torch.tensor([first for _, first in shard]),
        }
        for name in parts[0][2]:
            tensors[name] = torch.cat([states[name] for _, _, states in parts])
        paths.append(folder / f"{number}.safetensors")
        save_file(tensors, paths[-1])
        responses += parts
    return paths, responses


@pytest.mark.parametrize("store", ["full", "diff"])
def test_a_batch_holds_the_states_of_its_responses_in_order(store, tmp_path):
    """Also of responses of different shards, and of some of the layers alone."""
    paths, responses = write_shards(tmp_path, store)
    collection = Collection(paths, [3], store, pad_id=1)
    assert collection.lengths == [7, 5, 4, 9]
    assert collection.recorded_lengths == [4, 3, 3, 1]
    batch = collection.read([2, 0], CPU)
    assert batch.ids.shape == (2, 7)
    assert batch.ids[0].tolist() == [*responses[2][0].tolist(), 1, 1, 1]
    assert batch.ids[1].tolist() == responses[0][0].tolist()
    assert batch.positions.tolist() == [1, 2, 3, 7 + 3, 7 + 4, 7 + 5, 7 + 6]

    plus_name = "plus" if store == "full" else "v"
    for name, states in (("base", batch.base), (plus_name, batch.plus), ("minus", batch.minus)):
        if name == "minus" and store == "diff":
            assert states is None
            continue
        expected = [responses[i][2][f"{name}.3"] for i in (2, 0)]
        assert len(states) == 1
        assert torch.equal(states[0], torch.cat(expected))


def test_keeping_some_responses_keeps_their_lengths(tmp_path):
    paths, responses = write_shards(tmp_path, "full")
    collection = Collection(paths, LAYERS, "full", pad_id=1)
    collection.keep_random(2, seed=0)
    assert len(collection.responses) == len(collection.lengths) == 2
    all_ids = [ids.tolist() for ids, _, _ in responses]
    for i in range(2):
        batch = collection.read([i], CPU)
        assert batch.ids[0].tolist() in all_ids
        assert len(batch.ids[0]) == collection.lengths[i]
        assert len(batch.base[0]) == collection.recorded_lengths[i]


# ---------------------------------------------------------------- directions


def random_directions(k, seed):
    """U [k, D] with orthonormal rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(WIDTH, k, generator=generator))[0].T


def project_with_numpy(plus, minus, U):
    v = plus.double().numpy()
    if minus is not None:
        v = v - minus.double().numpy()
    U = U.double().numpy()
    return v @ U.T @ U


@pytest.mark.parametrize("differenced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_is_that_of_numpy(dtype, differenced):
    generator = torch.Generator().manual_seed(0)
    plus = [torch.randn(11, WIDTH, generator=generator).to(dtype) for _ in LAYERS]
    minus = [torch.randn(11, WIDTH, generator=generator).to(dtype) for _ in LAYERS]
    if differenced:
        minus = None
    directions = [random_directions(k=2, seed=i) for i in range(len(LAYERS))]
    projected = project(plus, minus, directions)
    for i, U in enumerate(directions):
        expected = project_with_numpy(plus[i], minus[i] if minus else None, U)
        assert projected[i].dtype == dtype
        # computed in fp32, rounded once
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        error = np.abs(projected[i].double().numpy() - expected)
        assert (error <= tolerance * np.abs(expected) + 1e-5).all()


@pytest.mark.parametrize("store", ["full", "diff"])
def test_a_collection_with_directions_gives_the_projection_and_no_minus(store, tmp_path):
    """b and the ids stay as they are."""
    paths, _ = write_shards(tmp_path, store)
    plain = Collection(paths, LAYERS, store, pad_id=1).read([3, 1], CPU)
    collection = Collection(paths, LAYERS, store, pad_id=1)
    collection.directions = [random_directions(k=3, seed=i) for i in range(len(LAYERS))]
    batch = collection.read([3, 1], CPU)
    assert batch.minus is None
    assert torch.equal(batch.ids, plain.ids)
    assert torch.equal(batch.positions, plain.positions)
    for i, U in enumerate(collection.directions):
        minus = plain.minus[i] if plain.minus else None
        expected = project_with_numpy(plain.plus[i], minus, U)
        assert np.allclose(batch.plus[i].numpy(), expected, atol=1e-6)
        assert torch.equal(batch.base[i], plain.base[i])


def test_differences_are_those_of_every_response(tmp_path):
    paths, responses = write_shards(tmp_path, "full")
    collection = Collection(paths, LAYERS, "full", pad_id=1)
    passes = list(collection.differences(CPU, tokens_per_pass=10))
    assert len(passes) > 1
    for i, layer in enumerate(LAYERS):
        rows = torch.cat([v[i] for v in passes])
        expected = []
        for _, _, states in responses:
            expected += (states[f"plus.{layer}"] - states[f"minus.{layer}"]).tolist()
        assert sorted(rows.tolist()) == sorted(expected)


def test_a_difference_is_in_fp32():
    plus, minus = torch.tensor([[256.0]]).bfloat16(), torch.tensor([[0.5]]).bfloat16()
    # nine bits, of which bf16 holds eight
    [v] = difference([plus], [minus])
    assert v.dtype == torch.float32
    assert v.item() == 255.5
