// `phalanx`: looks at the machine, compiles kernels ahead of time, keeps the cache, and measures.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <functional>

#include "cli/commands.h"
#include "phalanx/version.h"
#include "text/text.h"

namespace phalanx::cli {
namespace {

// Every command is declared here, and leaves in `run` what to do once the arguments are known to be right.
int run_command_line(int argc, char** argv) {
  CLI::App app("FP8 matrix products for NVIDIA Hopper: look at the machine, compile kernels ahead of time, measure.");
  app.name("phalanx");
  app.set_version_flag("--version", format_text("phalanx {}", version()));
  app.require_subcommand(1);
  std::function<int()> run;

  InfoOptions info_options;
  auto* info_command = app.add_subcommand("info", "Versions, GPUs, driver, NVRTC, cache: what a bug report needs");
  info_command->add_flag("--json", info_options.json, "Print JSON");
  info_command->callback([&] { run = [&] { return info(info_options); }; });

  WarmupOptions warmup_options;
  auto* warmup_command = app.add_subcommand("warmup", "Compile every kernel; needs NVRTC, but no GPU");
  warmup_command->add_option("--out", warmup_options.out, "Also write the cubins to this directory: a pack");
  warmup_command->add_option("--json", warmup_options.json,
                             "Write compile seconds, registers and spills here (- to print)");
  warmup_command->add_option("--jobs", warmup_options.jobs, "Threads (0: one per core)")->check(CLI::NonNegativeNumber);
  warmup_command->add_option("--arch", warmup_options.arch, "Architecture")->capture_default_str();
  warmup_command->add_flag("--fresh", warmup_options.fresh, "Compile even what the cache holds");
  warmup_command->callback([&] { run = [&] { return warmup(warmup_options); }; });

  bool show_json = false;
  auto* cache_command = app.add_subcommand("cache", "The disk cache of compiled kernels");
  cache_command->require_subcommand(1);
  auto* show_command = cache_command->add_subcommand("show", "List the entries");
  show_command->add_flag("--json", show_json, "Print JSON");
  show_command->callback([&] { run = [&] { return cache_show(show_json); }; });
  cache_command->add_subcommand("clear", "Delete every entry")->callback([&] { run = [] { return cache_clear(); }; });

  BenchOptions bench_options;
  auto* bench_command = app.add_subcommand("bench", "Time gemm_fp8 on this machine's GPU, or on its CPU");
  bench_command->add_option("--device", bench_options.device, "auto, cpu, cuda or cuda:<ordinal>")
      ->capture_default_str();
  bench_command->add_option("--out-dtype", bench_options.out_dtype, "Type of D")
      ->check(CLI::IsMember({"bf16", "f32"}))
      ->capture_default_str();
  auto* m = bench_command->add_option("--m", bench_options.m, "Rows of A and D")->check(CLI::PositiveNumber);
  auto* n = bench_command->add_option("--n", bench_options.n, "Rows of B, columns of D")->check(CLI::PositiveNumber);
  auto* k = bench_command->add_option("--k", bench_options.k, "Columns of A and B")->check(CLI::PositiveNumber);
  m->needs(n)->needs(k);
  n->needs(m)->needs(k);
  k->needs(m)->needs(n);
  bench_command->add_option("--set", bench_options.sets, "Sets of shapes: " + names_of_sets())
      ->delimiter(',')
      ->excludes(m);
  bench_command->add_option("--repeats", bench_options.min_repeats, "At least this many runs of each shape")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  bench_command->add_option("--seconds", bench_options.min_seconds, "At least this long on each shape")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  bench_command->add_option("--json", bench_options.json, "Write the rows here (- to print)");

  BenchEpOptions ep_options;
  auto* ep_command = bench_command->add_subcommand("ep", "Time dispatch and combine between the GPUs, or on the CPU");
  ep_command->add_option("--device", ep_options.device, "cuda: all GPUs; cpu; auto: whichever there is")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  ep_command->add_option("--ranks", ep_options.ranks, "0: one a GPU, or two on the CPU")
      ->check(CLI::Range(0, 64))
      ->capture_default_str();
  ep_command
      ->add_option("--tokens", ep_options.tokens, "Of each rank; 0: 4096, or 128 with --latency, or 32 on the CPU")
      ->check(CLI::NonNegativeNumber);
  ep_command->add_option("--hidden", ep_options.hidden, "Columns of a token")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  ep_command->add_option("--experts", ep_options.experts, "Of all ranks")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  ep_command->add_option("--topk", ep_options.topk, "Experts of a token")
      ->check(CLI::Range(1, 32))
      ->capture_default_str();
  ep_command->add_option("--num-sms", ep_options.num_sms, "SMs of a call (0: 32, or 128 with --latency)")
      ->check(CLI::NonNegativeNumber);
  ep_command->add_flag("--latency", ep_options.latency, "The regime for few tokens");
  ep_command->add_option("--repeats", ep_options.repeats, "Timed calls")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  ep_command->add_option("--json", ep_options.json, "Write the rows here (- to print)");

  bench_command->callback([&] {
    if (ep_command->parsed())
      run = [&] { return bench_ep(ep_options); };
    else
      run = [&] { return bench(bench_options); };
  });

  TuneOptions tune_options;
  auto* tune_command = app.add_subcommand("tune", "Measure every kernel on shapes of your own, and keep the choices");
  tune_command->add_option("shapes", tune_options.shapes, "MxNxK, as in 64x7168x2048")->required();
  tune_command->add_option("--device", tune_options.device, "cuda or cuda:<ordinal>; auto is the first that serves")
      ->capture_default_str();
  tune_command->add_option("--out-dtype", tune_options.out_dtype, "Type of D")
      ->check(CLI::IsMember({"bf16", "f32"}))
      ->capture_default_str();
  tune_command->add_option("--num-sms", tune_options.num_sms, "SMs that the products may use (0: all)")
      ->check(CLI::NonNegativeNumber);
  tune_command->add_option("--rounds", tune_options.rounds, "Timed runs of each kernel")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  tune_command->callback([&] { run = [&] { return tune(tune_options); }; });

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // The missing subcommand is told before the word that is none.
    const auto unknown = app.remaining(true);
    if (error.get_exit_code() != static_cast<int>(CLI::ExitCodes::RequiredError) || unknown.empty())
      return app.exit(error);
    print_text(stderr, "phalanx: {} is no subcommand here; --help lists them\n", unknown.front());
    return error.get_exit_code();
  }
  return run();
}

}  // namespace
}  // namespace phalanx::cli

int main(int argc, char** argv) {
  try {
    return phalanx::cli::run_command_line(argc, argv);
  } catch (const std::exception& error) {
    phalanx::print_text(stderr, "phalanx: {}\n", error.what());
    return 1;
  }
}
