"""The Chinese of each English sentence of an answer, with the same figures.

A figure in braces is filled in by `rayfin.language.localized`. Words that are typed, such as
settings, options and names of methods, stay as they are; so do units.
"""

from __future__ import annotations

CHINESE = {
    # --- what it rests on
    "{history} trials of the history and {reference} of the reference": (
        "历史中的 {history} 个试验和 {reference} 个参考试验"
    ),
    "learned from {settings} settings tried with {models} model{plural} of about this size, among "
    "{trials}; they take away {relevance:.0%} of the doubt about which settings are better here": (
        "学自{trials}，其中 {models} 个规模相近的模型试过 {settings} 组设置；"
        "它们消除了此处“哪些设置更好”的 {relevance:.0%} 的不确定性"
    ),
    "the rules: {trials} say next to nothing about this scenario (they take away {relevance:.0%} "
    "of the doubt about which settings are better)": (
        "依据规则：{trials}对此场景几乎没有参考价值"
        "（只消除了“哪些设置更好”的 {relevance:.0%} 的不确定性）"
    ),
    "the rules: {trials} include models of about this size, none of this family and none trained "
    "on this data": (
        "依据规则：{trials}中有规模相近的模型，但没有同系列的，也没有用这份数据训练过的"
    ),
    "the rules: {trials} say nothing about a model of this size{far}": (
        "依据规则：{trials}不能说明这一规模的模型{far}"
    ),
    " ({size})": "（{size}）",
    "{times:.3g} times smaller": "比它小 {times:.3g} 倍",
    "{times:.3g} times larger": "比它大 {times:.3g} 倍",
    "{here}: the nearest, {nearest}, is {far}, and settings carry over within a factor of "
    "{factor:g}": "{here}：最接近的是 {nearest}，{far}，而设置只在 {factor:g} 倍以内可以沿用",
    "set aside: {trials}; a score that can't be, or far below all near it": (
        "已搁置：{trials}；其得分不可能，或远低于附近的所有试验"
    ),
    "count for little: {trials}; they contradict the trials around them": (
        "几乎不计：{trials}；它们与周围的试验相矛盾"
    ),
    "count for less: {trials}; the trials of their source scatter more than their settings "
    "explain": "权重降低：{trials}；其来源的试验离散程度超出设置所能解释的范围",
    "{count} trial{plural} ({named})": "{count} 个试验（{named}）",
    "a trial that is gone from the history": "已不在历史中的试验",
    "gone from the history": "已不在历史中",
    "a trial": "试验",
    "a model": "某模型",
    "a model of {size}B": "{size}B 模型",
    "{model} on {data}": "{data} 上的 {model}",
    "{trial} ({origin}, {licence})": "{trial}（{origin}，{licence}）",
    "{what}, {where}: {score}": "{what}，{where}：{score}",
    # --- as it is printed
    "Train {what}": "训练 {what}",
    "{method}, lr {rate:g}, {length}: {memory} GiB, {time} {unit} ({source}, {sure})": (
        "{method}，lr {rate:g}，{length}：{memory} GiB，{time} {unit}（{source}，{sure}）"
    ),
    "{each} of {room}": "{each} / {room}",
    "learned": "学自试验",
    "rules": "依据规则",
    "quite sure": "把握较大",
    "fairly sure": "把握一般",
    "unsure": "把握较小",
    "{steps} step{plural}": "{steps} 步",
    "{epochs:g} epoch{plural}": "{epochs:g} 轮",
    "length": "长度",
    "method": "方法",
    "size": "容量",
    "time": "时间",
    "shortfall": "差距",
    "diverges": "发散",
    "For {model} on {data}, {hardware}. Shortfall: 0 is the best known, 1 the worst; in brackets "
    "80 % intervals.": (
        "{model}，数据 {data}，{hardware}。差距：0 为已知最佳，1 为最差；括号内为 80 % 区间。"
    ),
    "{sentence}.": "{sentence}。",
    "The rules say: {rule}": "规则建议：{rule}",
    " of {size} GiB": "，每块 {size} GiB",
    "{count} GPU{plural}{each}": "{count} 块 GPU{each}",
    "Or {kind}: {text}": "也可以{kind}：{text}",
    "quantise": "量化",
    "distribute": "分布式",
    "merge": "合并",
    "distil": "蒸馏",
    "served as {how}": "部署方式：{how}",
    "--why says why; --json has all of it": "--why 说明理由；--json 给出全部内容",
    # --- an estimate
    "peak memory": "峰值内存",
    "of the device": "设备共有",
    "of each worker's": "每个工作进程可用",
    "training time": "训练时间",
    "cost": "费用",
    "{epochs:g} epoch{plural} ({steps})": "{epochs:g} 轮（{steps}）",
    "{model}, {method}, {length} on {machine} ({device})": (
        "{model}，{method}，{length}，{machine}（{device}）"
    ),
    "each of {workers} workers": "{workers} 个工作进程各自",
    "one worker": "一个工作进程",
    "time and cost of the optimizer steps; evaluations and answers are not counted": (
        "时间与费用只计优化器步骤，不含评估与生成回答"
    ),
    "may not be enough": "可能不够",
    "enough": "够用",
    "not enough": "不够",
    "{low} to {high}": "{low} 至 {high}",
    "weights": "权重",
    "adapter": "适配器",
    "gradients": "梯度",
    "optimizer": "优化器",
    "activations": "激活",
    "overhead": "其他开销",
    "the parts by formula; the totals corrected by {trials} measured trials, {near} of them of "
    "this model and method": (
        "各部分按公式计算；总量经 {trials} 个实测试验校正，其中 {near} 个属于此模型和方法"
    ),
    "by formula alone: no trial on such a device has been measured yet": (
        "仅按公式计算：还没有此类设备上的实测试验"
    ),
    "by formula alone: no trial on such devices under {strategy} has been measured yet": (
        "仅按公式计算：还没有在 {strategy} 下使用此类设备的实测试验"
    ),
    # --- the scaffold's guide
    "nothing in particular": "没有特别之处",
    "what it takes, before it runs": "运行前估算开销",
    "one run, published as {name}": "训练一次，发布为 {name}",
    "{trials} trials around it; the best is published as {name}": (
        "在它周围试 {trials} 次，最佳者发布为 {name}"
    ),
    "answers as {name}": "以 {name} 提供回答",
    "Run from this directory:": "在此目录中运行：",
    "Settings:": "设置：",
    "For it:": "优点：",
    "Against it:": "风险：",
    "serve.yaml serves the whole model that is trained first: {path}": (
        "serve.yaml 部署先训练出的完整模型：{path}"
    ),
    "The history's password is in none of these files: set PGPASSWORD, or ~/.pgpass.": (
        "这些文件都不含历史数据库的密码：请设置 PGPASSWORD 或 ~/.pgpass。"
    ),
    # --- the picture
    "What is expected of each candidate ({source}, relevance {relevance:.0%})": (
        "各候选方案的预期（{source}，相关度 {relevance:.0%}）"
    ),
    "{rank}: {method}, shortfall {shortfall:.2f} in {seconds:.3g} seconds": (
        "{rank}：{method}，差距 {shortfall:.2f}，{seconds:.3g} 秒"
    ),
    "Chosen: {chosen}.": "选出：{chosen}。",
    "{count} candidates by training time and shortfall.": "{count} 个候选方案的训练时间与差距。",
    "training time, seconds (log scale; marks that would overlap are moved aside)": (
        "训练时间，秒（对数刻度；会重叠的标记已错开）"
    ),
    "shortfall: 0 is the best known, 1 the worst": "差距：0 为已知最佳，1 为最差",
    # --- probes
    "all {count} probes failed ({steps} of {total} steps each, {seconds:.0f} s): the learning rate "
    "stays {rate:.2g}": (
        "全部 {count} 个探测都失败了（每个 {steps}/{total} 步，共 {seconds:.0f} s）："
        "学习率仍为 {rate:.2g}"
    ),
    "{count} probes of {steps} of {total} steps keep the learning rate {rate:.2g}; they cost "
    "{seconds:.0f} s": (
        "{count} 个探测（每个 {steps}/{total} 步）保留学习率 {rate:.2g}；共用 {seconds:.0f} s"
    ),
    "{count} probes of {steps} of {total} steps change the learning rate from {before:.2g} to "
    "{rate:.2g}; they cost {seconds:.0f} s": (
        "{count} 个探测（每个 {steps}/{total} 步）把学习率从 {before:.2g} 改为 {rate:.2g}；"
        "共用 {seconds:.0f} s"
    ),
    "failed": "失败",
    ", from the history": "，取自历史",
    "probe: learning rate {rate:.2g}, {steps} of {total} steps: {told}{where}": (
        "探测：学习率 {rate:.2g}，{steps}/{total} 步：{told}{where}"
    ),
    # --- what was guessed
    "{size:.3g} billion parameters": "{size:.3g}B 参数",
    "{size:.3g} million parameters": "{size:.3g}M 参数",
    "{size:,.0f} parameters": "{size:,.0f} 个参数",
    "the model is taken to have {guess}": "假定模型有 {guess}",
    "{size}, and its shapes are guessed from {like}": "{size}，各层形状参照 {like} 估计",
    "the sizes of {model} are those published for {family} of {size}; its files are not here": (
        "{model} 的尺寸取自已发布的 {family}（{size}）；其文件不在本机"
    ),
    "by its name {model} has {guess}; its files are not here": (
        "按名称推断，{model} 有 {guess}；其文件不在本机"
    ),
    "by its name {model} has {guess}, and it is taken to be dense, which says too much of its "
    "time; its files are not here": (
        "按名称推断，{model} 有 {guess}，并按稠密模型计算，时间会高估；其文件不在本机"
    ),
    "the samples are taken to have {mean:.0f} tokens in the mean, 95 % of them at most {most}, "
    "by the bytes of their text (2.5 a token); the model's tokenizer is not here to count them": (
        "没有该模型的分词器，按每个 token 2.5 字节估计：平均 {mean:.0f} 个，95 % 不超过 {most} 个"
    ),
    "95 % of the samples are taken to have at most {most:g} tokens, the longest {longest:g}; "
    "data.path=FILE counts them": (
        "假定 95 % 的样本不超过 {most:g} 个 token，最长 {longest:g} 个；data.path=FILE 可实际统计"
    ),
    "{count} GPUs are assumed; num_gpus says how many": (
        "假定有 {count} 块 GPU；可用 num_gpus 指定"
    ),
    "each GPU is taken to be as fast as NVIDIA's {like}": "假定每块 GPU 与 NVIDIA {like} 一样快",
    "each GPU is taken to have {size:g} GiB; gpu_memory_gb says how many": (
        "假定每块 GPU 有 {size:g} GiB 显存；可用 gpu_memory_gb 指定"
    ),
    # --- for and against a choice
    "covers for where those before it go wrong": "在前面的方案失效时兜底",
    "4-bit weights make room for it": "4 位权重为它腾出显存",
    "much like trial {trial}: {what}": "与试验 {trial} 很相似：{what}",
    "expected near the best known, with little doubt": "预计接近已知最佳，且把握较大",
    "{chance:.0%} of settings like it diverge": "类似的设置有 {chance:.0%} 会发散",
    "little is known of such settings here: its interval is wide": (
        "对此处的这类设置所知甚少：区间很宽"
    ),
    "without a GPU the base model's forward pass is nearly all of the time, so that few trainable "
    "parameters and a small model are what helps": (
        "没有 GPU 时，时间几乎都花在基座模型的前向计算上，可训练参数少、模型小才有用"
    ),
    "4-bit weights save memory on CPU but no time; P-Tuning needs more steps than LoRA": (
        "4 位权重在 CPU 上省内存但不省时间；P-Tuning 需要的步数比 LoRA 多"
    ),
    "4-bit weights and recomputed activations leave memory for large batches, which a long run "
    "over much data needs most": (
        "4 位权重和激活重计算为大批次留出显存，数据多、训练久时最需要这一点"
    ),
    "4-bit products and recomputed activations each cost time for every step": (
        "4 位乘法和激活重计算都会让每一步变慢"
    ),
    "the base fits in its own precision, and with little data the adapter's capacity is not what "
    "limits it": "基座模型以原精度就放得下，而数据少时，适配器容量不是瓶颈",
    "small data overfit: watch the evaluation loss, and stop early": (
        "数据少容易过拟合：关注评估损失，及早停止"
    ),
    "answers that are waited for need several GPUs at inference, or a smaller model": (
        "有人等待的回答需要多 GPU 推理，或更小的模型"
    ),
    "4 bits save memory, and cost time to the first token on some GPUs; a distilled model has to "
    "be evaluated as a new one": (
        "4 位量化省显存，但在部分 GPU 上会延长首 token 时间；蒸馏出的模型要当作新模型重新评估"
    ),
    "several GPUs hold the base in its own precision, and each step's batch is shared": (
        "多块 GPU 以原精度就放得下基座模型，每一步的批次由它们分担"
    ),
    "many workers make the batch larger, and with it the learning rate that fits": (
        "工作进程越多批次越大，合适的学习率也随之变大"
    ),
    "the scenario does not say enough": "场景信息不足",
    # --- how to deploy it
    "one base model with 8-bit weights (engine.weights=int8) and the adapter beside": (
        "一个 8 位权重的基座模型（engine.weights=int8），旁挂适配器"
    ),
    "the 4-bit base that it was trained on (engine.quantization_bit=4)": (
        "训练时所用的 4 位基座模型（engine.quantization_bit=4）"
    ),
    "several replicas (deployment.replicas), or a distilled model of its own": (
        "多个副本（deployment.replicas），或单独部署蒸馏出的模型"
    ),
    "a base model of its own": "单独部署为一个完整模型",
    "beside other adapters on the 4-bit base (engine.quantization_bit=4)": (
        "与其他适配器共用 4 位基座模型（engine.quantization_bit=4）"
    ),
    "merged into its base model, or an adapter in a shared deployment": (
        "合并进基座模型，或作为共享部署中的适配器"
    ),
    "an adapter in a shared deployment, switched per request": (
        "作为共享部署中的适配器，按请求切换"
    ),
    # --- where nothing fits
    "nothing fits: {model} needs about {about:.1f} GiB at least ({low:.1f} to {high:.1f}), and "
    "there are {room:.1f} GiB on {device}; what would: {remedies}": (
        "没有方案放得下：{model} 至少约需 {about:.1f} GiB（{low:.1f} 至 {high:.1f}），"
        "而 {device} 有 {room:.1f} GiB；可行的办法：{remedies}"
    ),
    "nothing answers in time: the first token takes {low:.3g} to {high:.3g} ms on {device}, more "
    "than --latency-target-ms {target:g}; use a smaller model or a faster machine, or allow more": (
        "没有方案满足时延：在 {device} 上首 token 需要 {low:.3g} 至 {high:.3g} ms，"
        "超过 --latency-target-ms {target:g}；请换更小的模型或更快的机器，或放宽限制"
    ),
    "nothing ends in time: the fastest takes {low:.2g} to {high:.2g} hours for {steps} steps, more "
    "than --budget-hours {budget:g}; use fewer {length}, a smaller model or a faster machine, or "
    "allow {least:.2g} hours": (
        "没有方案能按时训练完：最快的 {steps} 步也要 {low:.2g} 至 {high:.2g} 小时，"
        "超过 --budget-hours {budget:g}；请减小 {length}，换更小的模型或更快的机器，"
        "或允许 {least:.2g} 小时"
    ),
    "a GPU": "GPU",
    "without {settings} ({method} does)": "去掉 {settings}（{method} 即可）",
    "--num-gpus {count} ({method}, sharded)": "--num-gpus {count}（{method}，分片）",
    "data.max_length={length} ({method})": "data.max_length={length}（{method}）",
    "a GPU of {size} GiB ({method})": "一块 {size} GiB 的 GPU（{method}）",
    "a machine with {size} GiB ({method})": "一台有 {size} GiB 内存的机器（{method}）",
    "a model of up to {size} ({method})": "不超过 {size}的模型（{method}）",
    "{method} over 4-bit weights": "4 位权重上的 {method}",
    "a machine with more memory, or a smaller model": "内存更大的机器，或更小的模型",
    "{others}; or {last}": "{others}；或{last}",
    # --- what was asked for and changes nothing
    "{what} changes no choice: by the upper bound of its estimate the first one ends in "
    "{hours:.2g} hours": "{what} 不改变任何方案：按估计的上界，首选在 {hours:.2g} 小时内结束",
    "{what} changes no choice: none is surer to end in time than the first, which is expected to "
    "take {hours:.2g} hours": (
        "{what} 不改变任何方案：没有哪个比首选更有把握按时结束，首选预计需要 {hours:.2g} 小时"
    ),
    "{what} changes no choice: nothing that is expected to do as well takes less time": (
        "{what} 不改变任何方案：预计效果相当的方案都不更省时间"
    ),
    "{what} changes no choice: each can be merged into its base, and then answers as fast as that "
    "does": "{what} 不改变任何方案：每个都能合并进基座，合并后与基座回答得一样快",
    "{what} changes no choice: of what was given nothing answers sooner": (
        "{what} 不改变任何方案：在给定的设置下没有回答更快的"
    ),
    "whether {target:g} ms to the first token are kept isn't known: no model of about this size "
    "was served on such a device; rayfin serve measures it": (
        "首个词元能否在 {target:g} ms 内返回尚不可知：这类设备上没有部署过规模相近的模型；"
        "rayfin serve 会测量它"
    ),
    # --- the rules' other branches
    "serve the base with 8-bit weights: faster on a CPU, and an answer may differ in a word": (
        "以 8 位权重部署基座：在 CPU 上更快，个别词可能不同"
    ),
    "train or serve over 4-bit weights, a quarter of the memory for the base: where several models "
    "share a GPU; each step, and the first token, may take longer": (
        "以 4 位权重训练或部署，基座只占四分之一显存，适合多个模型共用一块 GPU；"
        "每一步和首个词元可能更慢"
    ),
    "serve with one engine on each of the {count} GPUs": "在 {count} 块 GPU 上各部署一个引擎",
    "serve one model over the {count} GPUs, by vLLM": "用 vLLM 把一个模型分布到 {count} 块 GPU 上",
    "share the training among the {count} GPUs": "让 {count} 块 GPU 共同训练",
    "an adapter that is merged into its base costs nothing when it answers; merging is not in this "
    "version: PEFT's merge_and_unload does it, and what it writes to the directory merged is "
    "served so": (
        "合并进基座的适配器在回答时没有额外开销；本版本没有合并命令：可用 PEFT 的 "
        "merge_and_unload，其写入目录 merged 的模型这样部署"
    ),
    "a small model answers sooner; distilling this one into it is not in this version, and what "
    "the small one takes on the same data is asked so": (
        "小模型回答更快；本版本没有蒸馏，小模型用同样的数据训练需要什么，可以这样询问"
    ),
    # --- how long to train
    "how long to train isn't advised, as the number of samples isn't known; rows or data.path says "
    "it": "样本数未知，因此不建议训练时长；rows 或 data.path 可说明样本数",
    "{epochs} epoch{plural} over {rows} samples: published trainings pass 3 times over up to some "
    "{many} samples, fewer times over more, and up to {most} times over few; "
    "train.num_train_epochs says otherwise": (
        "{rows} 个样本训练 {epochs} 轮：已发表的训练在约 {many} 个样本以内训练 3 轮，"
        "更多样本时轮数更少，样本很少时最多 {most} 轮；可用 train.num_train_epochs 另行指定"
    ),
    "budget_hours leaves {steps} steps, {share:.2g} epochs, of the advised {epochs} ({all} steps): "
    "allow {times:.2g} times as long for them": (
        "budget_hours 只够训练 {steps} 步（{share:.2g} 轮），建议为 {epochs} 轮（{all} 步）："
        "全部完成需要 {times:.2g} 倍的时间"
    ),
}
