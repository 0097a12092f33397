"""The commands that take out what a run has learned: embed and search."""

from __future__ import annotations

import argparse

from pipeline.cli.arguments import make_parser, positive
from pipeline.commands import command
from pipeline.errors import EXIT_DONE, RequestError
from pipeline.stopping import Stop
from pipeline.store.path import user_path
from pipeline.waiting import waiting_for


def embed_parser() -> argparse.ArgumentParser:
    embed = command("embed")
    parser = make_parser(
        embed,
        "Embed images, videos, sounds and texts into Parquet: a column of vectors for each common space.",
        epilog=f"""\
examples:
  {embed} --run runs/demo --out found                      the held-out sets of a run
  {embed} --run runs/pets --input photos --out found       a folder of files
  {embed} --run exported --input photos.parquet --out found --explore

Then {command("search")} "a dog" --in found. The same command again goes on where it stopped, however it stopped.
Several machines share the work by --shard 0/8, --shard 1/8, ... over the same folder.

exit codes: 0 done, 1 failed, 2 the request was wrong, 75 stopped: run it again""",
    )
    parser.add_argument("--run", type=user_path, required=True, metavar="FOLDER", help="a run's directory or an export")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="PATH",
        help="a manifest or a folder of files, or its URI; may be repeated (default: the run's held-out sets)",
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="folder of the embeddings")
    parser.add_argument(
        "--data-set",
        action="append",
        default=[],
        metavar="NAME",
        help="prepare files as this data set of the recipe, needed where several differ; may be repeated",
    )
    parser.add_argument(
        "--scheme", action="append", default=[], metavar="NAME", help="read media URIs of this kind too, e.g. ftp"
    )
    parser.add_argument(
        "--clips", type=positive, default=1, metavar="N", help="windows of a video or sound, averaged (default: 1)"
    )
    parser.add_argument("--features", action="store_true", help="add a column of the pooled features before any head")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="make every N-th part, from I on")
    parser.add_argument("--explore", action="store_true", help="write explore.html, a page of items and their nearest")
    parser.set_defaults(job=_embed)
    return parser


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, e.g. 0/8, found {text}")
    return int(index), int(count)


def _embed(arguments: argparse.Namespace, stop: Stop) -> int:
    with waiting_for("libraries to load"):
        from pipeline.embed.job import Request, embed

    request = Request(
        run=arguments.run,
        out=arguments.out,
        inputs=tuple(arguments.input),
        data_sets=tuple(arguments.data_set),
        schemes=tuple(arguments.scheme),
        clips=arguments.clips,
        features=arguments.features,
        shard=arguments.shard,
    )
    embed(request)
    if arguments.explore:
        from pipeline.embed.explorer import write_explorer

        with waiting_for("the explorer page"):
            print(f"explorer: {write_explorer(arguments.out)}")
    return EXIT_DONE


def search_parser() -> argparse.ArgumentParser:
    search = command("search")
    parser = make_parser(
        search,
        "Find the items of each modality that are nearest to a text or a file, among those that were embedded.",
        epilog=f"""\
examples:
  {search} "a dog barking" --in found
  {search} --file clip.mp4 --in found --count 20
  {search} --file clip.mp4 --modality audio --in found     by the sound of a video

Prints a table and writes search.html into the folder: pictures, film strips and sounds in one page.

exit codes: 0 done, 1 failed, 2 the request was wrong""",
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the text to look for")
    parser.add_argument("--file", metavar="PATH", help="an image, a video or a sound to look for")
    parser.add_argument("--modality", metavar="NAME", help="the modality of --file (default: by its ending)")
    parser.add_argument(
        "--in",
        dest="folder",
        type=user_path,
        required=True,
        metavar="FOLDER",
        help=f"what {command('embed')} has written",
    )
    parser.add_argument("--count", type=positive, default=8, metavar="N", help="items of each modality (default: 8)")
    parser.add_argument("--space", metavar="NAME", help="the common space to compare by (default: the trained pair's)")
    parser.add_argument(
        "--html", type=user_path, metavar="FILE", help="the page to write (default: FOLDER/search.html)"
    )
    parser.set_defaults(job=_search)
    return parser


def _search(arguments: argparse.Namespace, stop: Stop) -> int:
    with waiting_for("libraries to load"):
        from pipeline.embed.search import Search, query_of
        from pipeline.embed.search_page import print_found, write_page

    query = query_of(arguments.text, arguments.file, arguments.modality)
    page = arguments.html or arguments.folder / "search.html"
    if not page.parent.is_dir():
        raise RequestError(f"--html {page}: expected a file in a folder that is there")
    with waiting_for("the model to load"):
        search = Search(arguments.folder, space=arguments.space)
    with waiting_for("the search"):
        found = search.nearest(query, arguments.count)
    print_found(search, found)
    write_page(search, found, page)
    print(f"page: {page}")
    return EXIT_DONE
