"""`quire bench …`: the benchmarks, by name."""

import argparse

from quire.bench import cpu, engine, gateway, kernels, scheduler_load, serve_load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    serve = benchmarks.add_parser(
        "serve",
        help="load on a running server",
        description="Load on a running server: a closed loop, or requests that arrive by themselves.",
    )
    serve_load.add_arguments(serve)
    serve.set_defaults(run_benchmark=serve_load.run)
    edge = benchmarks.add_parser(
        "gateway",
        help="what the gateway adds to an engine",
        description="What the gateway adds to the times of an engine that only ticks, and how much it carries; no server is needed.",
    )
    gateway.add_arguments(edge)
    edge.set_defaults(run_benchmark=gateway.run)
    scheduler = benchmarks.add_parser(
        "scheduler", help="CPU time of the scheduler", description="CPU time of the scheduler, per sequence and step; no server is needed."
    )
    scheduler_load.add_arguments(scheduler)
    scheduler.set_defaults(run_benchmark=scheduler_load.run)
    on_cpu = benchmarks.add_parser(
        "cpu", help="the worker beside transformers, on this processor", description="The worker beside transformers, in turns."
    )
    cpu.add_arguments(on_cpu)
    on_cpu.set_defaults(run_benchmark=cpu.run)
    whole_engine = benchmarks.add_parser(
        "engine",
        help="scheduler and ranks together, without gRPC",
        description="Speed of the scheduler process and rank processes together, without gateway, gRPC and Ray; no server is needed.",
    )
    engine.add_arguments(whole_engine)
    whole_engine.set_defaults(run_benchmark=engine.run)
    on_gpu = benchmarks.add_parser(
        "kernels", help="the kernels on this GPU", description="Time of each kernel on this GPU, beside its floor and torch's own way."
    )
    kernels.add_arguments(on_gpu)
    on_gpu.set_defaults(run_benchmark=kernels.run)


def run(args: argparse.Namespace) -> int:
    return int(args.run_benchmark(args))
