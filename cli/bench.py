"""`quire bench …`: the benchmarks, by name."""

import argparse

from quire.bench import serve_load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    serve = benchmarks.add_parser("serve", help="load on a running server", description="Closed-loop load on a running server.")
    serve_load.add_arguments(serve)
    serve.set_defaults(run_benchmark=serve_load.run)


def run(args: argparse.Namespace) -> int:
    return int(args.run_benchmark(args))
