local schedule = require "halo.schedule"

describe("schedule", function()
  local function near(expected, got) assert.is_true(math.abs(expected - got) < 1e-15, ("%.17g"):format(got)) end

  it("rises from the first step and reaches the peak", function()
    local rate = { type = "warmup", peak = 1e-3, steps = 4, decay = "constant", to = 0 }
    assert.same({ 0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3 }, schedule.all(rate, 6))
    near(3, schedule.value(3, 7, 10))
    near(2, schedule.value({ peak = 2 }, 1, 10))
  end)

  it("decays to its end at the last step", function()
    local rate = { peak = 1, steps = 2, decay = "linear", to = 0.2 }
    near(1, schedule.value(rate, 2, 10))
    near(1 - 0.8 / 8, schedule.value(rate, 3, 10))
    near(0.2, schedule.value(rate, 10, 10))
    near(0.2, schedule.value(rate, 99, 10))
    local cosine = { peak = 1, steps = 0, decay = "cosine", to = 0 }
    near(0.5, schedule.value(cosine, 5, 10))
    near(0, schedule.value(cosine, 10, 10))
    near((1 + math.cos(math.pi * 0.1)) / 2, schedule.value(cosine, 1, 10))
  end)

  it("takes the length of the decay from the rate", function()
    local rate = { peak = 1, steps = 10, decay = "linear", to = 0, over = 5 }
    near(0.4, schedule.value(rate, 13, 1000))
    near(0, schedule.value(rate, 15, 1000))
    near(0, schedule.value(rate, 999, 1000))
  end)

  it("is sane when the rise takes all steps", function()
    local rate = { peak = 1, steps = 10, decay = "cosine", to = 0.5 }
    near(1, schedule.value(rate, 10, 10))
    near(0.5, schedule.value(rate, 11, 10))
  end)

  it("names what it does not know", function()
    assert.has_error(function() schedule.value({ peak = 1, decay = "cosin" }, 3, 9) end)
    local ok, err = pcall(schedule.value, { peak = 1, decay = "cosin" }, 3, 9)
    assert.is_false(ok)
    assert.matches('did you mean "cosine"', tostring(err))
    assert.matches("got nil", tostring(select(2, pcall(schedule.value, nil, 1, 2))))
  end)
end)
