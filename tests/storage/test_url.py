from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from clipfilter_wds.storage.url import parse_url


@pytest.mark.parametrize(
    ("url", "caches", "scheme", "source"),
    [
        ("a.tar", "", None, "a.tar"),
        ("a::b.tar", "", None, "a::b.tar"),
        ("simplecache::a.tar", "", None, "simplecache::a.tar"),
        ("s3:/b/a.tar", "", None, "s3:/b/a.tar"),
        ("s3://b/a::b.tar", "", "s3", "s3://b/a::b.tar"),
        ("S3://b/a\n.tar", "", "s3", "S3://b/a\n.tar"),
        ("simplecache::s3://b/a.tar", "simplecache::", "s3", "s3://b/a.tar"),
        ("a::b::s3://c::d", "a::b::", "s3", "s3://c::d"),
        ("zip://a.tar::b.zip", "", "zip", "zip://a.tar::b.zip"),
        ("http://[::1]:80/a.tar", "", "http", "http://[::1]:80/a.tar"),
    ],
)
def test_only_a_scheme_with_two_slashes_makes_a_url(url, caches, scheme, source):
    parsed = parse_url(url)
    assert (parsed.caches, parsed.scheme, parsed.source, str(parsed)) == (caches, scheme, source, url)


@given(st.text())
def test_any_text_is_parsed_and_none_of_it_is_lost(text):
    parsed = parse_url(text)
    assert str(parsed) == text
    assert (parsed.scheme is None) <= (parsed.local_path is not None)


@pytest.mark.parametrize(
    ("url", "path"),
    [("~/a.tar", "{home}/a.tar"), ("~nobody-here.tar", "~nobody-here.tar"), ("file:///a?b#c::d", "/a?b#c::d")],
)
def test_a_path_of_this_machine_is_as_it_stands_but_for_the_home_folder(url, path):
    assert str(parse_url(url).local_path) == path.format(home=Path.home())
    assert parse_url("memory://a").local_path is None


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://us:p@er@host:80/a/0.tar?x=1/2#f", "host:80/a/0.tar"),
        ("https://us?er:p#w@host/0.tar", "host/0.tar"),
        ("s3://b/a#1?2.tar", "b/a#1?2.tar"),
        ("s3://b/a.tar?versionId=1", "b/a.tar"),
        ("memory://a.tar", "a.tar"),
        ("simplecache::s3://key@b/a.tar", "b/a.tar"),
    ],
)
def test_a_place_holds_nothing_secret(url, place):
    assert parse_url(url).place == place
