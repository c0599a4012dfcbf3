"""What ranks make of each other's answers. (Real ranks: tests/distributed.)"""

from __future__ import annotations

from svg2_compile.runtime.agreement import Terms, _combined

FACTS = {"dense_steps": "2", "blocks.0.attn1": "sparse (sparse)", "step": 0}


def test_equal_ranks_are_sparse():
    assert _combined([(0, FACTS, Terms(True)), (1, FACTS, Terms(True))]) == Terms(True)


def test_equal_ranks_without_a_sparse_graph_differ_in_nothing():
    assert _combined([(0, FACTS, Terms(False)), (1, FACTS, Terms(False))]) == Terms(False)


def test_what_differs_is_named_with_the_ranks():
    terms = _combined([(0, FACTS, Terms(True)), (5, {**FACTS, "dense_steps": "3"}, Terms(True))])
    assert not terms.sparse and terms.differing == "dense_steps (rank 0: 2, rank 5: 3)"


def test_a_rank_whose_graph_failed_is_named():
    terms = _combined([(0, FACTS, Terms(True)), (1, FACTS, Terms(False))])
    assert not terms.sparse and "rank 1 has none that runs" in terms.differing


def test_facts_that_one_rank_has_alone_differ():
    terms = _combined([(0, {"step": 0}, Terms(True)), (1, FACTS, Terms(True))])
    assert not terms.sparse and "blocks.0.attn1 (rank 0: None" in terms.differing


def test_what_an_earlier_group_found_is_passed_on():
    found = Terms(False, "top_p (rank 0: 0.9, rank 2: 0.8)")
    assert _combined([(0, FACTS, Terms(True)), (1, FACTS, found)]) == found
