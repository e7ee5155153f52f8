import numpy as np
import pytest

from foveal.core.errors import DataError, UsageError
from foveal.evaluate.fusion import fuse, pair_index, product_scores, search_weights


def scores(rows: int, classes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), rows)


def test_product_is_the_outer_product():
    verb, noun = scores(6, 3, 0), scores(6, 4, 1)
    expected = np.stack([np.outer(v, n).ravel() for v, n in zip(verb, noun, strict=True)])
    np.testing.assert_allclose(product_scores([verb, noun]), expected)
    pairs = np.array([[0, 1], [2, 3], [1, 0]])
    some = np.stack([verb[:, v] * noun[:, n] for v, n in pairs.tolist()], 1)
    found = product_scores([verb, noun], pairs)
    np.testing.assert_allclose(found, some / some.sum(1, keepdims=True))
    np.testing.assert_allclose(found.sum(1), 1)
    never = product_scores([np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]])], np.array([[0, 1], [1, 0]]))
    np.testing.assert_allclose(never, 0.5)


def test_fusing():
    members = [scores(8, 5, seed) for seed in range(3)]
    np.testing.assert_allclose(fuse([members[0]] * 3), members[0])
    np.testing.assert_allclose(fuse(members, [2, 1, 1]), fuse([members[2], members[0], members[1]], [1, 2, 1]))
    np.testing.assert_allclose(fuse(members, [3, 0, 1]).sum(1), 1)
    np.testing.assert_allclose(fuse(members, [0, 5, 0]), members[1])


def test_weights_are_found_where_one_member_knows_and_do_not_depend_on_the_order():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    good = 0.6 * np.eye(5)[labels] + 0.4 * scores(200, 5, 1)
    noise = scores(200, 5, 2)
    found = search_weights([good, noise], labels)
    assert found[0] > 0.9
    assert found.sum() == pytest.approx(1)
    np.testing.assert_allclose(search_weights([noise, good], labels), found[::-1])
    alike = search_weights([good, good], labels)
    np.testing.assert_allclose(fuse([good, good], alike.tolist()), good)


def test_bad_input_is_refused_in_words():
    p, q = scores(4, 3, 0), scores(4, 3, 1)
    with pytest.raises(UsageError, match="weights -1, 2: expected none negative"):
        fuse([p, q], [-1, 2])
    with pytest.raises(UsageError, match="weights 0, 0"):
        fuse([p, q], [0, 0])
    with pytest.raises(UsageError, match="1 weights for 2 members"):
        fuse([p, q], [1])
    with pytest.raises(DataError, match=r"member 1 has classes b, a, c, member 0 a, b, c"):
        fuse([p, q], classes=["abc", "bac"])
    with pytest.raises(DataError, match="shapes"):
        fuse([p, q[:2]])
    with pytest.raises(DataError, match=r"label \[1, 1\] is none of the 2 pairs"):
        pair_index(np.array([[0, 1], [1, 1]]), np.array([[0, 1], [1, 0]]))
    assert pair_index(np.array([[1, 0], [0, 1]]), np.array([[0, 1], [1, 0]])).tolist() == [1, 0]
    with pytest.raises(DataError, match="pairs name entry 7 of part 1"):
        product_scores([p, q], np.array([[0, 7]]))
    with pytest.raises(DataError, match="no held-out clips"):
        search_weights([p[:0], q[:0]], np.zeros(0, int))
