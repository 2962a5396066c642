// The core on several threads at once, for ThreadSanitizer: prints what it has run, and exits with 1 if the results of
// threads differ from those of one.
//
// OpenMP has one thread here (OMP_NUM_THREADS): the sanitizer knows nothing of how libgomp's threads wait for each other.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "chess/board.h"
#include "chess/games.h"
#include "comm/single.h"
#include "cpu/make_cpu_ops.h"
#include "gpt2/model.h"
#include "ops/timed_ops.h"
#include "thread_ranks.h"

namespace {

using namespace llmc;

constexpr int64_t kBatch = 2, kSeq = 9, kSteps = 2;

void require(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "threads: %s\n", what.c_str());
  std::exit(1);
}

// Calls function(i) for i < count, each on a thread of its own.
template <typename F>
void at_once(int count, F function) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; i++) threads.emplace_back(function, i);
  for (std::thread& thread : threads) thread.join();
}

struct Case {
  int ranks = 1, stage = 0, recompute = 1;
  DType precision = DType::F32;
  int accumulation_steps = 2;
  uint32_t seed = 0;  // of the delays of collectives

  std::string name() const {
    return std::to_string(ranks) + " ranks, -z " + std::to_string(stage) + ", -r " + std::to_string(recompute) + ", " +
           name_of(precision);
  }
};

struct Result {
  std::vector<float> losses;  // of each step, its norm, and a validation
  std::string parameters;     // their bytes
  bool operator==(const Result& other) const { return losses == other.losses && parameters == other.parameters; }
};

std::vector<int32_t> ids(int64_t vocab_size, int64_t number) {
  std::vector<int32_t> ids(size_t(kBatch * kSeq));
  for (size_t i = 0; i < ids.size(); i++) ids[i] = int32_t((int64_t(i) * 7 + number * 13) % vocab_size);
  return ids;
}

// A model's steps on its share of the data, which is the same for any number of ranks.
Result train(const Case& c, std::unique_ptr<Ops> ops, std::shared_ptr<Communicator> comm) {
  const GPT2Config config{16, 37, 128, 3, 2, 16};
  Options options;
  options.batch_size = kBatch;
  options.seq_len = kSeq;
  options.precision = options.grad_dtype = c.precision;
  options.recompute = c.recompute;
  options.zero_stage = c.stage;
  GPT2 model(config, options, std::move(ops), comm);
  model.init_random(42);
  Result result;
  for (int64_t step = 0; step < kSteps; step++) {
    for (int64_t micro = 0; micro < c.accumulation_steps; micro++) {
      const int64_t number = (step * c.accumulation_steps + micro) * c.ranks + comm->rank();
      const std::vector<int32_t> tokens = ids(config.vocab_size, number), targets = ids(config.vocab_size, number + 1);
      model.forward(tokens.data(), kBatch, kSeq);
      model.backward(targets.data(), kBatch, kSeq, micro, c.accumulation_steps);
    }
    UpdateOptions update{};
    update.learning_rate = 1e-3f;
    update.weight_decay = 0.1f;
    update.step = step + 1;
    model.update(update);
    result.losses.push_back(model.loss());
    result.losses.push_back(model.grad_norm());
  }
  std::vector<float> losses(size_t(kBatch * kSeq));
  model.evaluate(ids(config.vocab_size, 1).data(), ids(config.vocab_size, 2).data(), kBatch, kSeq, losses.data());
  result.losses.insert(result.losses.end(), losses.begin(), losses.end());
  for (size_t unit = 0; unit < model.layout().units.size(); unit++) {
    const Tensor parameters = model.gather_parameters(unit);
    const int64_t used = model.layout().units[unit].tensors.back().offset +
                         model.layout().units[unit].tensors.back().numel - model.layout().units[unit].offset;
    result.parameters.append(parameters.as<char>(), size_t(used * size_of(parameters.dtype)));
  }
  return result;
}

Result on_one_thread(const Case& c) { return train(c, make_cpu_ops(), std::make_shared<SingleProcess>()); }

Result on_ranks(const Case& c) {
  Meeting meeting(c.ranks);
  std::vector<Result> results(size_t(c.ranks));
  at_once(c.ranks, [&](int rank) {
    results[size_t(rank)] = train(c, make_cpu_ops(), std::make_shared<ThreadRank>(meeting, rank, c.seed));
  });
  for (const Result& result : results) require(result == results[0], c.name() + ": ranks differ");
  return results[0];
}

// The step while collectives are under way: the same bits whatever their delays, and nearly those of one rank.
void ranks() {
  for (const int size : {2, 3}) {
    for (int stage = 0; stage <= 3; stage++) {
      for (const DType precision : {DType::F32, DType::BF16}) {
        Case c{size, stage, stage == 3 ? 4 : stage, precision};
        const Result result = on_ranks(c);
        c.seed = 1;
        require(on_ranks(c) == result, c.name() + ": delays change the result");
        std::printf("%s\n", c.name().c_str());
        if (precision != DType::F32) continue;
        const Result alone = on_one_thread({1, 0, c.recompute, precision, c.accumulation_steps * size});
        for (size_t i = 0; i < alone.losses.size(); i++) {
          // Sums in another order, in fp32.
          require(std::fabs(alone.losses[i] - result.losses[i]) < 1e-4f, c.name() + ": not the losses of one rank");
        }
      }
    }
  }
}

// Models that know nothing of each other, the first of which settles what is settled once.
void models() {
  std::vector<Result> results(4);
  at_once(4, [&](int i) {
    auto ops = make_cpu_ops();
    if (i % 2) ops = std::make_unique<TimedOps>(std::move(ops));
    results[size_t(i)] = train({}, std::move(ops), std::make_shared<SingleProcess>());
  });
  for (const Result& result : results) require(result == on_one_thread({}), "models on several threads differ");
  std::printf("4 models\n");
}

// Operations of one CpuOps, as those of llmc._C.ops are.
void operations() {
  const auto ops = make_cpu_ops();
  std::vector<float> x(6 * 40), weight(40 * 40, 0.5f);
  for (size_t i = 0; i < x.size(); i++) x[i] = float(i % 11) - 5;
  const Tensor in = make_tensor(x.data(), DType::F32, 6, 40), w = make_tensor(weight.data(), DType::F32, 40, 40);
  std::vector<std::vector<float>> results(4, std::vector<float>(x.size()));
  at_once(4, [&](int i) {
    const Tensor out = make_tensor(results[size_t(i)].data(), DType::F32, 6, 40);
    ops->matmul_forward(out, in, w, Tensor{});
    ops->gelu_forward(out, out);
  });
  for (const auto& result : results) require(result == results[0], "operations on several threads differ");
  std::printf("operations\n");
}

void games() {
  const std::string game = "[Event \"Rated\"]\n[Result \"1-0\"]\n\n1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 1-0\n\n";
  std::vector<std::vector<uint16_t>> tokens(4);
  at_once(4, [&](int i) {
    tokens[size_t(i)] = chess::encode_pgn(game + game, {}).tokens;
    require(chess::perft(chess::Board(), 3) == 8902, "perft");
  });
  for (const auto& found : tokens) require(found.size() == 26 && found == tokens[0], "games on several threads differ");
  std::printf("games of chess\n");
}

}  // namespace

int main() {
  games();
  operations();
  models();
  ranks();
}
