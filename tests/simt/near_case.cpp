// Runs one kernel of csrc/pairs/launch_cuda.h. What is in the arguments: near.py.
#include <cstring>
#include <stdexcept>

#include "case.h"
#include "common/simt.h"
#include "named_arrays.h"
#include "pairs/launch_cuda.h"

namespace otface::test {

using namespace pairs;

namespace {

class NearCase : NamedArrays {
 public:
  explicit NearCase(const Arrays& arguments) : NamedArrays(arguments) {}

  Arrays run() {
    const std::string step(static_cast<const char*>(needed("near_step").data()), needed("near_step").bytes);
    if (step == "near_costs")
      near_costs();
    else if (step == "far_weights")
      check(far_weights_cuda({shape(), points(), given("cost"), given("grad"), like("weights", "cost")}, nullptr));
    else if (step == "near_gradient")
      check(near_gradient_cuda({shape(), points(), given("cost"), given("grad"), given("far_x"), given("far_y"),
                                like("grad_x", "x"), like("grad_y", "y")},
                               nullptr));
    else
      throw std::runtime_error("no such step");
    return std::move(results_);
  }

 private:
  void near_costs() {
    void* cost = like("cost", "cost");
    std::memcpy(cost, arguments_.at("cost").data(), arguments_.at("cost").bytes);
    check(near_costs_cuda({shape(), points(), cost}, nullptr));
  }

  CostShape shape() const {
    const Array &cost = needed("cost"), &x = needed("x");
    return {cost.type == 'd', static_cast<Metric>(integer("metric", 0)), cost.shape[0], cost.shape[1], cost.shape[2],
            x.shape[2]};
  }
  PointSets points() const { return {given("x"), given("y"), given("x_squares"), given("y_squares")}; }
  // A result of the type and shape of an argument.
  void* like(const std::string& name, const std::string& argument) {
    const Array& array = arguments_.at(argument);
    return result(name, array.type, array.shape);
  }
};

}  // namespace

Arrays run_near_case(const Arrays& arguments) { return NearCase(arguments).run(); }

}  // namespace otface::test
